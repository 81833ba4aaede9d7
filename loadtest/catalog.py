"""What a load test can ask a server for: its model, and the adapters and fusions that requests are spread over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fusionserve.client import Adapter, AdapterState, AsyncClient, Fusion, Model
from fusionserve.errors import PreconditionError
from fusionserve.loadtest_config import BASE, BLEND, FUSION, LORA, LoadConfig

Artifact = tuple[str, str]  # ("adapter" or "fusion", name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """A server as it was when the load test began; `mix` has the weights of the kinds it can be asked for."""

    model: Model
    adapters: tuple[str, ...]  # most popular first
    fusions: tuple[str, ...]
    loaded_versions: Mapping[Artifact, int]  # of what was in memory
    mix: Mapping[str, float]


async def read_catalog(client: AsyncClient, config: LoadConfig) -> Catalog:
    """Asks the server.

    Raises PreconditionError if it cannot do what `config` wants, ClientError if it does not answer.
    """
    model = await client.model()
    adapters = [adapter async for adapter in client.adapters.list()]
    fusions = [fusion async for fusion in client.fusions.list()]
    catalog = Catalog(
        model=model,
        adapters=_chosen("adapter", config.adapters, [adapter.name for adapter in adapters]),
        fusions=_chosen("fusion", config.fusions, [fusion.name for fusion in fusions]),
        loaded_versions={**_loaded("adapter", adapters), **_loaded("fusion", fusions)},
        mix={},
    )
    _check_prompts(config, model)
    return _with_mix(catalog, config)


def _chosen(noun: str, wanted: tuple[str, ...], listed: list[str]) -> tuple[str, ...]:
    for name in wanted:
        if name not in listed:
            raise PreconditionError(f"the server has no {noun} {name!r}")
    return wanted or tuple(listed)


def _loaded(noun: str, artifacts: list[Adapter] | list[Fusion]) -> dict[Artifact, int]:
    ready = (artifact for artifact in artifacts if artifact.state is AdapterState.READY)
    return {(noun, artifact.name): artifact.version for artifact in ready}


def _check_prompts(config: LoadConfig, model: Model) -> None:
    if config.prompt_file is not None:
        if not model.has_tokenizer:
            raise PreconditionError(
                "the server's model has no tokenizer: prompts from a file are not possible"
            )
        return
    longest = config.prompt_lengths.largest + config.output_lengths.largest
    if longest > model.max_context_tokens:
        raise PreconditionError(
            f"prompts and outputs of up to {longest} tokens do not fit: the server takes {model.max_context_tokens}"
        )


def _with_mix(catalog: Catalog, config: LoadConfig) -> Catalog:
    num_needed = {
        BASE: (0, catalog.adapters),
        LORA: (1, catalog.adapters),
        BLEND: (config.blend_size, catalog.adapters),
        FUSION: (1, catalog.fusions),
    }
    possible = {kind for kind, (least, names) in num_needed.items() if len(names) >= least}
    mix = {kind: weight for kind, weight in config.mix.items() if weight > 0}
    if missing := mix.keys() - possible:
        raise PreconditionError(
            f"the server has too few adapters or fusions for: {', '.join(sorted(missing))}"
        )
    mix = mix or {kind: 1.0 for kind in num_needed if kind in possible}
    return replace(catalog, mix=mix)
