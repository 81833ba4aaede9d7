"""The engine as the servicers see it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from fusionserve.adapter_status import AdapterStatus, FusionStatus
from fusionserve.generation import GenerateParams, GenerationEvent, Prompt
from fusionserve.model_info import ModelInfo


class EngineFacade(Protocol):
    """Generation and the life of adapters and fusions. Called on the event loop; may raise FusionServeErrors.

    Tokenizing and loading have bounded room, which is shared between tenants.
    """

    async def start(self) -> None:
        """Starts the engine thread, loads the adapters and fusions named at start and warms up."""

    def generate(self, params: GenerateParams) -> AsyncGenerator[GenerationEvent, None]:
        """Yields started, chunks and finished; closing the generator aborts the request."""

    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool, tenant: str) -> tuple[int, ...]:
        """The ids of a text or a rendered chat."""

    async def detokenize(self, token_ids: tuple[int, ...], *, skip_special_tokens: bool, tenant: str) -> str:
        """The text of token ids."""

    def model_info(self) -> ModelInfo:
        """The base model and the engine's limits."""

    async def load_adapter(
        self, name: str, path: str | None, *, pin: bool | None, replace: bool, digest: str | None, tenant: str
    ) -> AdapterStatus:
        """Loads from under the engine's adapter folders; returns when requests may use the adapter.

        Raises ChecksumError if its weights do not have the `digest` (sha256 in hex), if one is given.
        """

    async def unload_adapter(self, name: str, *, force: bool) -> AdapterStatus:
        """Withdraws the name at once; returns when its requests have ended, which `force` makes them do."""

    async def get_adapter(self, name: str) -> AdapterStatus:
        """The adapter, loaded or on disk. Raises NotFoundError."""

    async def list_adapters(self) -> list[AdapterStatus]:
        """All adapters, loaded or on disk, by name."""

    async def load_fusion(
        self, name: str, path: str | None, *, pin: bool | None, replace: bool, digest: str | None, tenant: str
    ) -> FusionStatus:
        """Loads from under the engine's fusion folders, the members with it; returns when it may be used."""

    async def unload_fusion(self, name: str, *, force: bool) -> FusionStatus:
        """Withdraws the name at once; returns when its requests have ended, which `force` makes them do."""

    async def get_fusion(self, name: str) -> FusionStatus:
        """The fusion, loaded or on disk. Raises NotFoundError."""

    async def list_fusions(self) -> list[FusionStatus]:
        """All fusions, loaded or on disk, by name."""

    async def wait_failed(self) -> None:
        """Returns when the engine has died, never otherwise."""

    async def drain(self, grace_s: float) -> None:
        """Waits for running requests, and ends those left after `grace_s` with UnavailableError."""

    async def close(self) -> None:
        """Stops the engine thread and releases the model."""
