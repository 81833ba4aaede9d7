"""An inspected fusion as text: tables for the terminal, or JSON."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from fusionserve.training.fusion_inspection import FloatArray, FusionInspection, InspectedText
from fusionserve.training.token_texts import to_visible

_MAX_TEXT_WIDTH = 24
_BAR_WIDTH = 20
_BAR = "█"
_EIGHTHS = " ▏▎▍▌▋▊▉"
_LAYERS_IN_A_TABLE = 16
_DIGITS = 6


def to_tables(inspection: FusionInspection) -> str:
    """Lines for the terminal: each text's tokens with the member that leads, then the means."""
    lines = [_headline(inspection)]
    for number, text in enumerate(inspection.texts, start=1):
        lines += [
            "",
            f"prompt {number}: {counted(len(text.token_ids), 'token')}",
            *_token_lines(inspection, text),
        ]
        lines += ["", *_mean_lines(inspection, text), "", _entropy_line(inspection, text)]
    return "\n".join(lines)


def to_json(inspection: FusionInspection, picture: Path | None) -> str:
    """Everything, on one line of JSON."""
    fields = {
        "fusion": inspection.name,
        "base_model": inspection.base_model,
        "members": inspection.members,
        "layers": inspection.layers,
        "max_entropy": inspection.max_entropy,
        "prompts": [_to_fields(inspection, text) for text in inspection.texts],
        "picture": None if picture is None else str(picture),
    }
    return json.dumps(fields, ensure_ascii=False)


def layer_label(path: str) -> str:
    """The number of a layer, or the path of what is none."""
    number = path.rpartition(".")[2]
    return number if number.isdecimal() else path


def counted(number: int, noun: str) -> str:
    """1 token, 2 tokens."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _headline(inspection: FusionInspection) -> str:
    attentions = counted(len(inspection.attentions), "attention")
    return (
        f"fusion {inspection.name} on {inspection.base_model}: {counted(len(inspection.members), 'member')}, "
        f"{attentions} in {counted(len(inspection.layers), 'layer')}"
    )


def _token_lines(inspection: FusionInspection, text: InspectedText) -> Iterator[str]:
    shown = [_cut(to_visible(token)) for token in text.token_texts]
    leaders = [inspection.members[i] for i in text.by_token.argmax(axis=1)]
    widths = max(map(_width, (*shown, "TOKEN"))), max(map(len, (*leaders, "LEADER")))
    yield f"{'#':>5}  {'TOKEN':<{widths[0]}}  {'LEADER':<{widths[1]}}  WEIGHT"
    for i, (token, leader) in enumerate(zip(shown, leaders, strict=True)):
        weight = float(text.by_token[i].max())
        line = f"{i:>5}  {_pad(token, widths[0])}  {leader:<{widths[1]}}  {weight:>6.2f}  {_bar(weight)}"
        yield line.rstrip()


def _mean_lines(inspection: FusionInspection, text: InspectedText) -> Iterator[str]:
    """Members down, layers across, as many tables as keep the lines short."""
    name_width = max(map(len, (*inspection.members, "MEAN WEIGHT")))
    labels = [_short_label(path) for path in inspection.layers]
    by_layer = inspection.by_layer(text)
    for start in range(0, len(labels), _LAYERS_IN_A_TABLE):
        part = slice(start, start + _LAYERS_IN_A_TABLE)
        widths = [max(4, len(label)) for label in ("ALL", *labels[part])]
        if start:
            yield ""
        yield f"{'MEAN WEIGHT':<{name_width}}  {_cells(('ALL', *labels[part]), widths)}"
        for i, member in enumerate(inspection.members):
            cells = [f"{weight:.2f}" for weight in (text.mean[i], *by_layer[part, i])]
            yield f"{member:<{name_width}}  {_cells(cells, widths)}"


def _short_label(path: str) -> str:
    label = layer_label(path)
    return f"L{label}" if label.isdecimal() else label


def _entropy_line(inspection: FusionInspection, text: InspectedText) -> str:
    most = inspection.max_entropy
    share = f", {text.entropy / most:.0%} of the most ({most:.2f}, all members evenly)" if most else ""
    return f"mean entropy {text.entropy:.2f} nats{share}"


def _to_fields(inspection: FusionInspection, text: InspectedText) -> dict[str, object]:
    by_layer = zip(inspection.layers, inspection.by_layer(text), strict=True)
    by_attention = zip(inspection.attentions, text.weights, strict=True)
    return {
        "text": text.text,
        "tokens": [
            {
                "id": token_id,
                "text": token,
                "leader": inspection.members[int(weights.argmax())],
                "weights": _to_list(weights),
            }
            for token_id, token, weights in zip(text.token_ids, text.token_texts, text.by_token, strict=True)
        ],
        "mean_weights": dict(zip(inspection.members, _to_list(text.mean), strict=True)),
        "layer_weights": {layer: _to_list(weights) for layer, weights in by_layer},
        "attention_weights": {path: [_to_list(row) for row in rows] for path, rows in by_attention},
        "entropy": round(text.entropy, _DIGITS),
    }


def _to_list(weights: FloatArray) -> list[float]:
    return [round(float(weight), _DIGITS) for weight in weights]


def _cells(texts: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))


def _bar(weight: float) -> str:
    eighths = math.floor(weight * _BAR_WIDTH * 8 + 0.5)
    return _BAR * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT_WIDTH else f"{text[: _MAX_TEXT_WIDTH - 1]}…"


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _width(text: str) -> int:
    """Columns in a terminal, where East Asian characters take two and combining marks none."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)
