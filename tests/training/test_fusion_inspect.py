"""`fusionserve fusion inspect`: what it prints and draws is what the unfolded fusion gives."""

import io
import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import LETTERS, fusion_run, optimization, write_base, write_member, write_texts

from fusionserve.config import EMBEDDED, EMBEDDED_ADAPTERS, EMBEDDED_FUSIONS
from fusionserve.server.main import main
from fusionserve.training.frozen_base import FrozenBase, load_base
from fusionserve.training.fusion_inspection import FusionInspection, InspectedText
from fusionserve.training.fusion_measuring import placed_fusion
from fusionserve.training.fusion_training import train_fusion
from fusionserve.training.inspection_layout import flow_text
from fusionserve.training.inspection_plot import MAX_TOKENS, draw_inspection
from fusionserve.training.inspection_report import to_tables
from fusionserve.training.token_texts import split_text, to_visible

FUSION = EMBEDDED_FUSIONS / "domains"
NAMES = tuple(member["name"] for member in json.loads((FUSION / "fusion_config.json").read_text())["members"])
PERL = "sub new {\n    my $class = shift;\n    return bless {}, $class;\n}\n"


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return load_base(None)


def inspect(*argv: str) -> int:
    return main(["fusion", "inspect", *argv])


def to_prompts(out: str) -> list[dict[str, Any]]:
    prompts: list[dict[str, Any]] = json.loads(out)["prompts"]
    return prompts


def png_size(path: Path) -> tuple[int, int]:
    """Width and height, of a file that is a whole PNG."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-12:] == b"\0\0\0\0IEND\xaeB`\x82"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def made_up(num_members: int, num_tokens: int, num_layers: int = 4, token: str = " word") -> FusionInspection:
    random = np.random.default_rng(0)
    weights = random.dirichlet(np.ones(num_members), (num_layers, num_tokens))
    text = InspectedText(token * num_tokens, (0,) * num_tokens, (token,) * num_tokens, weights, 0.5)
    return FusionInspection(
        name="mix",
        base_model="tiny",
        members=tuple(f"member-{i}" for i in range(num_members)),
        attentions=tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(num_layers)),
        texts=(text,),
    )


def test_the_weights_are_those_of_the_unfolded_fusion(
    base: FrozenBase, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect("domains", "--prompt", PERL, "--json", "--out", "off") == 0
    (prompt,) = to_prompts(capsys.readouterr().out)
    token_ids = base.tokenizer.encode(PERL)
    with placed_fusion(FUSION, base, {name: EMBEDDED_ADAPTERS / name for name in NAMES}) as placed:
        with torch.no_grad():
            base.model(input_ids=torch.tensor([token_ids]))
        expected = {path: weights.double() for path, weights in placed.fusion.weights.items()}
    assert [token["id"] for token in prompt["tokens"]] == token_ids
    assert list(prompt["attention_weights"]) == list(expected)
    for path, weights in expected.items():
        torch.testing.assert_close(
            torch.tensor(prompt["attention_weights"][path], dtype=torch.double), weights, rtol=0, atol=1e-5
        )
    by_token = torch.tensor([token["weights"] for token in prompt["tokens"]], dtype=torch.double)
    torch.testing.assert_close(by_token, torch.stack(list(expected.values())).mean(0), rtol=0, atol=1e-5)


def test_json_has_means_and_weights_that_sum_to_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect("domains", "--prompt", PERL, "--json", "--out", "off") == 0
    result = json.loads(capsys.readouterr().out)
    (prompt,) = result["prompts"]
    assert (result["members"], result["picture"]) == (list(NAMES), None)
    assert "".join(token["text"] for token in prompt["tokens"]) == prompt["text"] == PERL
    rows = [token["weights"] for token in prompt["tokens"]]
    rows += [*prompt["layer_weights"].values(), list(prompt["mean_weights"].values())]
    rows += [row for by_token in prompt["attention_weights"].values() for row in by_token]
    assert np.allclose(np.sum(rows, axis=1), 1, atol=1e-5)
    means = np.mean([token["weights"] for token in prompt["tokens"]], axis=0)
    assert np.allclose(list(prompt["mean_weights"].values()), means, atol=1e-5)
    assert np.allclose(np.mean(list(prompt["layer_weights"].values()), axis=0), means, atol=1e-5)
    assert 0 < prompt["entropy"] < result["max_entropy"] == pytest.approx(math.log(len(NAMES)))


def test_the_member_of_the_domain_leads(capsys: pytest.CaptureFixture[str]) -> None:
    # Not from the beginning: the first Spanish document opens with a part that is in English.
    texts = [(EMBEDDED / "heldout" / f"{name}.txt").read_text()[1000:2000] for name in NAMES]
    flags = [flag for text in texts for flag in ("--prompt", text)]
    assert inspect("domains", *flags, "--json", "--out", "off") == 0
    means = [prompt["mean_weights"] for prompt in to_prompts(capsys.readouterr().out)]
    assert [max(mean, key=mean.__getitem__) for mean in means] == list(NAMES)


def test_the_tables_agree_with_the_json_and_the_picture_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert inspect("domains", "--prompt", "sub new {\n") == 0
    table = capsys.readouterr().out
    assert inspect("domains", "--prompt", "sub new {\n", "--json", "--out", "other.png") == 0
    (prompt,) = to_prompts(capsys.readouterr().out)
    lines = re.findall(r"^ +(\d+)  (\S+) +(\S+) +(\d\.\d\d)  █", table, re.MULTILINE)
    assert lines == [
        (str(i), to_visible(token["text"]), token["leader"], f"{max(token['weights']):.2f}")
        for i, token in enumerate(prompt["tokens"])
    ]
    for i, name in enumerate(NAMES):
        weights = [prompt["mean_weights"][name], *(row[i] for row in prompt["layer_weights"].values())]
        cells = re.search(rf"^{name} +(\d.*)$", table, re.MULTILINE)
        assert cells is not None
        assert cells[1].split() == [f"{weight:.2f}" for weight in weights]
    assert table.endswith("\npicture written to fusion-domains.png\n")
    assert png_size(tmp_path / "fusion-domains.png") == png_size(tmp_path / "other.png")


def test_prompts_come_from_files_and_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_bytes("żółć\r\n".encode())
    flags = ("--json", "--out", "off")
    assert inspect("domains", "--prompt", "a", "--prompt-file", str(tmp_path / "text"), *flags) == 0
    assert [prompt["text"] for prompt in to_prompts(capsys.readouterr().out)] == ["a", "żółć\r\n"]
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert inspect("domains", *flags) == 0
    assert [prompt["text"] for prompt in to_prompts(capsys.readouterr().out)] == ["from a pipe"]


def test_a_fusion_of_ones_own_with_attentions_at_modules_and_a_base_member(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_base(tmp_path / "base")
    members = {f"m{seed}": write_member(tmp_path / "adapters" / f"m{seed}", seed) for seed in (1, 2)}
    data = write_texts(tmp_path / "data.jsonl", LETTERS)
    changes = {"scope": "module", "base_member": True, "optimization": optimization(steps=1)}
    train_fusion(fusion_run(tmp_path, data, members, **changes))
    moved = (tmp_path / "adapters" / "m2").rename(tmp_path / "elsewhere")
    flags = ("--model", str(tmp_path / "base"), "--adapter-dir", str(tmp_path / "adapters"), "--json")
    argv = (str(tmp_path / "mix"), "--prompt", "abc cab", *flags, "--out", str(tmp_path / "mix.png"))
    assert inspect(*argv) == 2
    assert "member 'm2' is in no adapter folder; say --member m2=PATH" in capsys.readouterr().err
    assert inspect(*argv, "--member", f"m2={moved}") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["members"], result["layers"]) == (
        ["m1", "m2", "base"],
        ["model.layers.0", "model.layers.1"],
    )
    assert len(result["prompts"][0]["attention_weights"]) == 4
    assert png_size(tmp_path / "mix.png")
    assert inspect(str(tmp_path / "mix"), "--prompt", "a", "--adapter-dir", str(tmp_path / "adapters")) == 2
    capsys.readouterr()
    assert inspect("domains", "--prompt", "a", "--model", str(tmp_path / "base"), "--out", "off") == 1
    assert capsys.readouterr().err.startswith("error: WRONG_BASE_MODEL: the fusion was trained on")


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("nobody",), "there is no fusion 'nobody', neither a folder nor one of domains"),
        ((str(EMBEDDED),), "is not a fusion folder: it has no fusion_config.json"),
        (("domains", "--prompt", ""), "--prompt: it is empty"),
        (("domains", "--prompt", "\udcff"), "--prompt: it is not UTF-8"),
        (("domains", "--prompt-file", "nowhere.txt"), "there is no file 'nowhere.txt'"),
        (("domains", "--out", "picture.jpg"), "does not end in .png"),
        (("domains", "--out", "nowhere/picture.png"), "there is no folder nowhere"),
        (("domains", "--member", "perl"), "'perl' is not NAME=PATH"),
        (("domains", *("--member", f"perl={EMBEDDED_ADAPTERS / 'perl'}") * 2), "'perl' is given twice"),
        (("domains", "--member", f"x={EMBEDDED_ADAPTERS / 'perl'}"), "the fusion has no member 'x'; it has"),
        (("domains", "--prompt", "a" * 9999), "tokens; fusionserve-tiny reads"),
    ],
)
def test_wrong_command_lines_are_refused_in_one_line(
    argv: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect("--prompt", "x", *argv) == 2
    outcome = capsys.readouterr()
    assert reason in outcome.err
    assert (outcome.out, outcome.err.count("\n")) == ("", 1)


def test_no_prompt_at_a_terminal_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert inspect("domains") == 2
    assert "no prompt" in capsys.readouterr().err


def test_unusable_artifacts_end_with_their_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = f"perl={EMBEDDED_ADAPTERS / 'cpp'}"
    assert inspect("domains", "--prompt", "x", "--out", "off", "--member", wrong) == 1
    assert capsys.readouterr().err.startswith("error: MEMBER_DIGEST_MISMATCH: member perl is not")
    (tmp_path / "adapter_config.json").write_text("{")
    broken = f"perl={tmp_path}"
    assert inspect("domains", "--prompt", "x", "--out", "off", "--member", broken) == 1
    assert capsys.readouterr().err.startswith("error: CONFIG_MALFORMED: member perl: ")
    (tmp_path / "fusion_config.json").write_text("{")
    assert inspect(str(tmp_path), "--prompt", "x") == 1
    assert capsys.readouterr().err.startswith("error: CONFIG_MALFORMED: fusion_config.json")


def test_a_picture_that_cannot_be_written_costs_no_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path, inspection: FusionInspection) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fusionserve.training.inspect_command.draw_inspection", fail)
    assert inspect("domains", "--prompt", "x", "--out", "x.png") == 1
    outcome = capsys.readouterr()
    assert "MEAN WEIGHT" in outcome.out
    assert outcome.err == "fusionserve: x.png cannot be written: No space left on device\n"


@pytest.mark.parametrize("num_tokens", [1, 10, 200])
@pytest.mark.parametrize("num_members", [1, 2, 16, 40])
def test_pictures_of_any_size_stay_on_a_screen(tmp_path: Path, num_members: int, num_tokens: int) -> None:
    draw_inspection(tmp_path / "out.png", made_up(num_members, num_tokens))
    width, height = png_size(tmp_path / "out.png")
    assert 700 <= width <= 2600
    assert 200 <= height <= 4200


def test_a_picture_says_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(
        "fusionserve.training.inspection_plot._write", lambda page, x, y, text, **style: written.append(text)
    )
    draw_inspection(tmp_path / "out.png", made_up(2, MAX_TOKENS + 1, num_layers=1))
    assert any(text.startswith(f"the first {MAX_TOKENS} of {MAX_TOKENS + 1} tokens") for text in written)


def test_characters_without_a_glyph_and_signs_of_formulas_can_be_drawn(tmp_path: Path) -> None:
    for token in ("你", "$x$", "\x1b[31m", "\n\n", "", "\U0001f600"):
        draw_inspection(tmp_path / "out.png", made_up(2, 3, token=token))
        assert min(png_size(tmp_path / "out.png")) > 0


def test_many_layers_are_printed_below_each_other() -> None:
    lines = to_tables(made_up(3, 2, num_layers=40)).splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("MEAN WEIGHT")] == ["L15", "L31", "L39"]
    assert max(map(len, lines)) < 120


def test_tokens_add_up_to_the_text(base: FrozenBase) -> None:
    for text in ("  a b\n\tc", "żółć 你好 \U0001f600!", "\x00\x1b[31m"):
        token_ids, texts = split_text(base.tokenizer, text)
        assert len(token_ids) == len(texts)
        assert "".join(texts) == text


def test_shown_tokens_stay_on_their_line() -> None:
    assert to_visible(" a\n") == "·a⏎"
    assert to_visible("\x1b[31m\t\u202e\u2028") == r"\x1b[31m\t\u202e\u2028"
    assert to_visible("") == "…"


def test_text_flows_within_its_columns() -> None:
    tokens = ["one", " two", "\n\n", "", "a" * 25, " b", "\n", " c"]
    pieces = list(flow_text(tokens, 10))
    assert "".join(piece.text for piece in pieces) == "one two⏎⏎" + "a" * 25 + " b⏎ c"
    assert all(piece.column + len(piece.text) <= 10 for piece in pieces)
    ends = {(piece.line, piece.column) for piece in pieces}
    assert len(ends) == len(pieces)
    assert pieces[-1].line == pieces[-2].line + 1


def test_help_waits_for_no_torch_and_a_missing_package_is_named() -> None:
    code = (
        "import sys; from fusionserve.server.main import main\n"
        "try: main(['fusion', 'inspect', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules\n"
        "sys.modules['matplotlib'] = None\n"
        "sys.exit(main(['fusion', 'inspect', 'domains', '--prompt', 'x']))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--prompt-file" in done.stdout
    assert done.stderr.endswith(
        "error: matplotlib is not installed; this command needs: pip install 'fusionserve[training]'\n"
    )
