"""How many prompt tokens a step takes beside decoding streams: so many that it lasts as long as they may wait."""

from __future__ import annotations

_NEWEST = 0.3  # the newest step's weight in a mean
_LEAST_SHARE = (
    0.25  # of a step's time that its prompt tokens are taken to need, whatever the others are known to
)


class PromptPace:
    """Learns from the steps how long they last without prompts, and by how much each prompt token prolongs them.

    `step_s` is how long a step is to last, in seconds; `least` are the tokens that it takes in any case.
    """

    def __init__(self, least: int, step_s: float) -> None:
        self._least = least
        self._step_s = step_s
        self._decode_s = 0.0  # a step without prompts
        self._token_s: float | None = None  # what a prompt token adds; None: not known yet

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of the next step."""
        if self._token_s is None:
            return self._least
        return max(self._least, int((self._step_s - self._decode_s) / self._token_s))

    def observe(self, num_prompt_tokens: int, seconds: float) -> None:
        """Learns from a step that lasted so long; from a few prompt tokens there is nothing to learn."""
        if num_prompt_tokens == 0:
            self._decode_s = _mean(self._decode_s or seconds, seconds)
        elif 2 * num_prompt_tokens >= self._least:
            token_s = max(seconds - self._decode_s, seconds * _LEAST_SHARE) / num_prompt_tokens
            self._token_s = token_s if self._token_s is None else _mean(self._token_s, token_s)


def _mean(known: float, newest: float) -> float:
    return known + _NEWEST * (newest - known)
