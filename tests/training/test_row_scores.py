"""The scores that train, computed over rank rows, are those of the definition over the members' outputs."""

import pytest
import torch
from random_fusions import make_base, make_config, make_member, make_trained, random_tokens

from fusionserve.fusion.attention import FusionAttention


@pytest.mark.parametrize("member_keys", [True, False])
def test_row_scores_and_their_gradients_equal_the_definition(member_keys: bool) -> None:
    base = make_base()
    members = [make_member(base, seed, (3, 2, 3, 2)) for seed in range(4)]
    config = make_config(base, members, member_keys=member_keys, temperature=1.7)
    path = config.modules[0]
    attention = make_trained(config, base, seed=1).attentions[path]
    loras = [member.modules[path] for member in members]
    x = random_tokens(5, base.by_path[path].d_in, seed=2)
    parts = [x @ lora.shrink.T + (0 if lora.shrink_bias is None else lora.shrink_bias) for lora in loras]
    ups = torch.stack([u @ lora.expand for u, lora in zip(parts, loras, strict=True)], dim=1)
    member_of_row = torch.arange(4).repeat_interleave(torch.tensor([lora.rank for lora in loras]))
    expand = torch.cat([lora.expand for lora in loras])

    expected = attention.scores(x, ups)
    found = attention.row_scores(x, torch.cat(parts, dim=1), expand, member_of_row)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for one, other in zip(gradients(attention, found), gradients(attention, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def gradients(attention: FusionAttention, scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(scores.square().sum(), list(attention.parameters()), retain_graph=True)
