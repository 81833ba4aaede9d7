# ruff: noqa: E501  (one case a line)
"""Adapters and fusions on disk that must not be served, each made from one of the embedded ones by one change."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusionserve.config import EMBEDDED_ADAPTERS, EMBEDDED_FUSIONS

VALID = EMBEDDED_ADAPTERS / "perl"
VALID_FUSION = EMBEDDED_FUSIONS / "domains"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FUSION_CONFIG, FUSION_WEIGHTS = "fusion_config.json", "fusion_model.safetensors"
DROP = object()

Change = Callable[[Path], None]  # of a directory with a copy of the valid one


@dataclass(frozen=True)
class BadArtifact:
    """What to do to a valid directory, and what a load of it must answer."""

    name: str
    change: Change
    reason: str
    code: str = "FAILED_PRECONDITION"
    noun: str = "adapter"


def bad_artifacts() -> list[BadArtifact]:
    """All of them; names are unique."""
    return [*_files(), *_configs(), *_headers(), *_data(), *_tensors(), *_fusion_configs(), *_fusion_files()]


def write_bad(root: Path, number: int, bad: BadArtifact) -> str:
    """Makes the directory under `root` and returns its name."""
    name = f"bad-{number}"
    shutil.copytree(VALID if bad.noun == "adapter" else VALID_FUSION, root / name)
    bad.change(root / name)
    return name


def _files() -> Iterator[BadArtifact]:
    def replaced(file: str, make: Callable[[Path], object]) -> Change:
        def change(folder: Path) -> None:
            (folder / file).unlink()
            make(folder / file)

        return change

    for file, missing in ((CONFIG, "CONFIG_MISSING"), (WEIGHTS, "WEIGHTS_MISSING")):
        yield BadArtifact(f"no {file}", lambda folder, file=file: (folder / file).unlink(), missing)
        yield BadArtifact(
            f"{file} a link", replaced(file, lambda p: p.symlink_to("/etc/passwd")), "ADAPTER_PATH_ESCAPE"
        )
        yield BadArtifact(
            f"{file} a link to its like",
            replaced(file, lambda p: p.symlink_to(VALID / p.name)),
            "ADAPTER_PATH_ESCAPE",
        )
        yield BadArtifact(
            f"{file} a dangling link",
            replaced(file, lambda p: p.symlink_to("nowhere")),
            "ADAPTER_PATH_ESCAPE",
        )
        yield BadArtifact(f"{file} a directory", replaced(file, Path.mkdir), "NOT_A_REGULAR_FILE")
        yield BadArtifact(f"{file} a pipe", replaced(file, os.mkfifo), "NOT_A_REGULAR_FILE")
        yield BadArtifact(
            f"{file} a socket", replaced(file, lambda p: os.mknod(p, 0o140644)), "NOT_A_REGULAR_FILE"
        )

    def moved_away(folder: Path) -> None:
        target = folder.with_name(f"{folder.name}.elsewhere.d")
        folder.rename(target)
        folder.symlink_to(target)

    yield BadArtifact("the directory a link", moved_away, "ADAPTER_PATH_ESCAPE")
    for pickle in ("adapter_model.bin", "adapter_model.pt"):
        yield BadArtifact(
            f"only {pickle}", lambda folder, name=pickle: _rename(folder / WEIGHTS, name), "PICKLE_REFUSED"
        )


def _rename(path: Path, name: str) -> None:
    path.rename(path.with_name(name))


def _config(**changes: Any) -> Change:
    """Changes of keys of the configuration; DROP leaves one out."""

    def change(folder: Path) -> None:
        fields = {**json.loads((folder / CONFIG).read_text()), **changes}
        kept = {key: value for key, value in fields.items() if value is not DROP}
        (folder / CONFIG).write_text(json.dumps(kept))

    return change


def _text(file: str, data: bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(data) and None


def _configs() -> Iterator[BadArtifact]:
    malformed = {
        "empty": b"",
        "no JSON": b"{r: 16}",
        "a list": b"[]",
        "a number": b"3",
        "latin-1": '{"peft_type": "LÖRA"}'.encode("latin-1"),
        "NaN": b'{"peft_type": "LORA", "r": NaN}',
        "infinity": b'{"peft_type": "LORA", "r": 1e999}',
        "a key twice": b'{"peft_type": "LORA", "r": 1, "r": 16}',
        "deep": b"[" * 100_000,
        "deep objects": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
        "huge": b'{"a": "' + b"x" * (2 << 20) + b'"}',
        "100,000 digits": b'{"peft_type": "LORA", "r": ' + b"9" * 60_000 + b"}",
        "cut short": b'{"peft_type": "LORA", "r": 16, "lora_alpha"',
        "a BOM and more": b"\xff\xfe{}",
        "trailing": b"{} {}",
    }
    for name, data in malformed.items():
        yield BadArtifact(f"configuration: {name}", _text(CONFIG, data), "CONFIG_MALFORMED")
    wrong_types: dict[str, list[Any]] = {
        "r": [0, -1, 1.5, "16", None, True, [], 1 << 70],
        "lora_alpha": ["32", None, [], True],
        "use_rslora": ["yes", 1],
        "use_dora": ["yes", 3],
        "target_modules": [3, [3], {"a": 1}],
        "rank_pattern": [[], 3, {"q_proj": "x"}, {"q_proj": -1}],
        "alpha_pattern": [[], {"q_proj": []}],
        "layers_to_transform": ["x", ["x"], 1.5],
        "fan_in_fan_out": [3],
    }
    for key, values in wrong_types.items():
        for value in values:
            shown = json.dumps(value)
            yield BadArtifact(f"{key} = {shown[:20]}", _config(**{key: value}), "CONFIG_MALFORMED")
    unsupported: dict[str, Any] = {
        "peft_type": "IA3",
        "bias": "all",
        "trainable_token_indices": [1, 2],
        "target_parameters": ["mlp.experts"],
        "alora_invocation_tokens": [1],
        "init_lora_weights": "pissa",
        "layer_replication": [[0, 2]],
    }
    for key, value in unsupported.items():
        yield BadArtifact(f"unsupported {key}", _config(**{key: value}), "ADAPTER_UNSUPPORTED")
    for value in (None, 3, [], "lora"):
        yield BadArtifact(f"peft_type {value!r}", _config(peft_type=value), "ADAPTER_UNSUPPORTED")
    yield BadArtifact("another prefix tuning", _config(peft_type="PREFIX_TUNING"), "ADAPTER_UNSUPPORTED")
    yield BadArtifact("another base", _config(base_model_name_or_path="other/model"), "WRONG_BASE_MODEL")
    yield BadArtifact("another rank", _config(r=8, rank_pattern={}), "RANK_MISMATCH")


def _split(folder: Path, file: str = WEIGHTS) -> tuple[dict[str, Any], bytes]:
    raw = (folder / file).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _join(folder: Path, header: Any, data: bytes, file: str = WEIGHTS, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / file).write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def _header(edit: Callable[[dict[str, Any], str], Any]) -> Change:
    """`edit(header, name of the first tensor)` changes the header in place, or returns bytes for it."""

    def change(folder: Path) -> None:
        header, data = _split(folder)
        first = next(key for key in header if key != "__metadata__")
        edited = edit(header, first)
        _join(folder, edited if isinstance(edited, bytes) else header, data)

    return change


def _set(key: str, value: Any) -> Callable[[dict[str, Any], str], None]:
    return lambda header, first: header[first].__setitem__(key, value)


def _headers() -> Iterator[BadArtifact]:
    for name, size in (("0 bytes", 0), ("7 bytes", 7), ("8 bytes", 8), ("half a header", 300)):
        yield BadArtifact(
            f"weights of {name}", lambda f, size=size: os.truncate(f / WEIGHTS, size), "WEIGHTS_TRUNCATED"
        )
    lengths = {"2^63": 1 << 63, "2^64 - 1": (1 << 64) - 1, "100 MB": 100 << 20, "over the cap": (1 << 20) + 1}
    for name, length in lengths.items():
        yield BadArtifact(
            f"header length {name}", lambda f, n=length: _join(f, *_split(f), length=n), "HEADER_TOO_LARGE"
        )
    yield BadArtifact("header length 0", lambda f: _join(f, *_split(f), length=0), "WEIGHTS_MALFORMED")
    yield BadArtifact(
        "header past the end",
        lambda f: (f / WEIGHTS).write_bytes((1 << 19).to_bytes(8, "little") + b"{}") and None,
        "WEIGHTS_TRUNCATED",
    )
    yield BadArtifact(
        "header of blanks",
        _header(lambda header, first: b" " * 500_000 + json.dumps(header).encode()),
        "WEIGHTS_MALFORMED",
    )
    many = {f"t{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(9000)}
    yield BadArtifact("9,000 tensors", lambda f: _join(f, many, b""), "HEADER_TOO_LARGE")
    texts: dict[str, bytes] = {
        "a list": b"[]",
        "no JSON": b"{",
        "nothing": b"",
        "NaN": b'{"a": NaN}',
        "a tensor twice": b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        "deep": b'{"a":' * 50 + b"1" + b"}" * 50,
        "not UTF-8": b'{"\xff": 1}',
    }
    for name, text in texts.items():
        yield BadArtifact(f"header: {name}", lambda f, text=text: _join(f, text, b""), "WEIGHTS_MALFORMED")
    fields: dict[str, list[Any]] = {
        "shape": [[-1, 2], [1.5], "x", None, [1 << 63, 2], [1] * 9, [True], {}, [0]],
        "data_offsets": [[0], [0, 1, 2], [8, 0], [-4, 4], ["0", "4"], None, [1 << 63, 1 << 64], [4, 8]],
    }
    for key, values in fields.items():
        for value in values:
            yield BadArtifact(
                f"{key} {json.dumps(value)[:30]}", _header(_set(key, value)), "WEIGHTS_MALFORMED"
            )
    for dtype in ("I8", "F64", "F8_E4M3", "", 3, None, "f32"):
        yield BadArtifact(f"dtype {dtype!r}", _header(_set("dtype", dtype)), "DTYPE_UNSUPPORTED")
    yield BadArtifact("an extra key", _header(_set("extra", 1)), "WEIGHTS_MALFORMED")
    yield BadArtifact(
        "metadata of numbers",
        _header(lambda h, first: h.__setitem__("__metadata__", {"a": 1})),
        "WEIGHTS_MALFORMED",
    )


def _data() -> Iterator[BadArtifact]:
    def cut(folder: Path) -> None:
        os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1)

    def grown(folder: Path) -> None:
        with (folder / WEIGHTS).open("ab") as file:
            file.write(b"\0" * 5)

    def sparse(folder: Path) -> None:
        os.truncate(folder / WEIGHTS, 1 << 40)

    yield BadArtifact("a byte short", cut, "WEIGHTS_TRUNCATED")
    yield BadArtifact("bytes too many", grown, "WEIGHTS_MALFORMED")
    yield BadArtifact("a terabyte of nothing", sparse, "WEIGHTS_MALFORMED")
    yield BadArtifact(
        "a Git LFS pointer",
        _text(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "WEIGHTS_MALFORMED",
    )
    for name, number in {
        "NaN": float("nan"),
        "inf": float("inf"),
        "-inf": float("-inf"),
        "1e38": 1e38,
        "2e6": 2e6,
    }.items():
        for where in ("first", "last"):

            def change(folder: Path, number: float = number, where: str = where) -> None:
                header, data = _split(folder)
                entry = (min if where == "first" else max)(
                    (value for key, value in header.items() if key != "__metadata__"),
                    key=lambda value: value["data_offsets"][0],
                )
                start = entry["data_offsets"][0] if where == "first" else entry["data_offsets"][1]
                packed = (
                    struct.pack("<f", number)[-2:] if entry["dtype"] == "BF16" else struct.pack("<f", number)
                )
                at = start if where == "first" else start - len(packed)
                _join(folder, header, data[:at] + packed + data[at + len(packed) :])

            yield BadArtifact(f"{name} in the {where} number", change, "NOT_FINITE")


def _renamed(edit: Callable[[str], str | None], *, only_first: bool = True) -> Change:
    """Names of tensors changed; None leaves one out of the header, so that its bytes belong to nobody."""

    def change(folder: Path) -> None:
        header, data = _split(folder)
        first = next(key for key in header if key != "__metadata__")
        renamed = {
            edit(key) if key == first or not only_first else key: value
            for key, value in header.items()
            if key != "__metadata__"
        }
        renamed.pop(None, None)
        _join(folder, renamed, data)

    return change


def _tensors() -> Iterator[BadArtifact]:
    for name, edit in {
        "of no module": lambda key: key.replace("layers.0", "layers.99"),
        "of another projection": lambda key: key.replace("mlp", "moe"),
        "without a prefix": lambda key: key.removeprefix("base_model.model."),
        "with a path in it": lambda key: "../../" + key,
        "with a NUL in it": lambda key: key + "\0",
        "without a name": lambda key: "",
        "of a megabyte": lambda key: key + "x" * 200_000,
        "of a classifier": lambda key: "base_model.model.classifier.weight",
    }.items():
        yield BadArtifact(f"a tensor {name}", _renamed(edit), "UNEXPECTED_TENSOR")

    def without(part: str) -> Change:
        def change(folder: Path) -> None:
            header, data = _split(folder)
            header.pop("__metadata__", None)
            victim = next(key for key in header if part in key)
            start, end = header.pop(victim)["data_offsets"]
            for value in header.values():
                if value["data_offsets"][0] >= end:
                    value["data_offsets"] = [offset - (end - start) for offset in value["data_offsets"]]
            _join(folder, header, data[:start] + data[end:])

        return change

    yield BadArtifact("A without B", without("lora_B"), "PAIR_MISSING")
    yield BadArtifact("B without A", without("lora_A"), "PAIR_MISSING")

    def transposed(folder: Path) -> None:
        header, data = _split(folder)
        victim = next(key for key in header if "lora_A" in key)
        header[victim]["shape"] = header[victim]["shape"][::-1]
        _join(folder, header, data)

    yield BadArtifact("A transposed", transposed, "SHAPE_MISMATCH")
    yield BadArtifact("no tensors at all", lambda f: _join(f, {}, b""), "NO_EFFECTIVE_MODULES")


def _fusion(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        fields = {**json.loads((folder / FUSION_CONFIG).read_text()), **changes}
        kept = {key: value for key, value in fields.items() if value is not DROP}
        (folder / FUSION_CONFIG).write_text(json.dumps(kept))

    return change


def _member(edit: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Change:
    def change(folder: Path) -> None:
        fields = json.loads((folder / FUSION_CONFIG).read_text())
        fields["members"] = edit(fields["members"])
        (folder / FUSION_CONFIG).write_text(json.dumps(fields))

    return change


def _fusion_configs() -> Iterator[BadArtifact]:
    def bad(name: str, change: Change, reason: str) -> BadArtifact:
        return BadArtifact(f"fusion: {name}", change, reason, noun="fusion")

    yield bad("another version", _fusion(format_version=99), "FUSION_VERSION_UNSUPPORTED")
    wrong: dict[str, list[Any]] = {
        "name": [3, None, DROP],
        "base_model": [3, {}, DROP],
        "members": [[], 3, None, DROP, [3], [{}]],
        "modules": [3, None, DROP, [3]],
        "scope": ["token", 3, DROP],
        "d_key": [0, -1, "64", 1 << 40, DROP],
        "member_keys": ["yes", DROP],
        "value": ["none", {"kind": "whole"}, DROP],
        "temperature": [0, -1.0, "1", None, DROP],
        "base_member": [3, DROP],
        "colour": ["red"],
    }
    for key, values in wrong.items():
        for value in values:
            shown = "left out" if value is DROP else json.dumps(value)[:20]
            yield bad(f"{key} {shown}", _fusion(**{key: value}), "CONFIG_MALFORMED")
    yield bad("temperature NaN", _fusion_text(b'"temperature": NaN'), "CONFIG_MALFORMED")
    yield bad("a member twice", _member(lambda members: [*members[:-1], members[0]]), "CONFIG_MALFORMED")
    yield bad(
        "1,000 members",
        _member(lambda m: [{**m[0], "name": f"m{n}"} for n in range(1000)]),
        "CONFIG_MALFORMED",
    )
    yield bad(
        "a stranger among the members",
        _member(lambda m: [{**m[0], "name": "nobody"}, *m[1:]]),
        "MEMBER_MISSING",
    )
    yield bad(
        "a fusion among the members",
        _member(lambda m: [{**m[0], "name": "domains"}, *m[1:]]),
        "MEMBER_MISSING",
    )
    yield bad(
        "a member's other digest",
        _member(lambda m: [{**m[0], "sha256": "0" * 64}, *m[1:]]),
        "MEMBER_DIGEST_MISMATCH",
    )
    yield bad(
        "a member's other scalings",
        _member(lambda m: [{**m[0], "scalings_sha256": "0" * 64}, *m[1:]]),
        "MEMBER_DIGEST_MISMATCH",
    )
    yield bad(
        "a member of a path", _member(lambda m: [{**m[0], "name": "../perl"}, *m[1:]]), "CONFIG_MALFORMED"
    )
    yield bad("another base", _fusion(base_model={"name": "x", "fingerprint": "0" * 64}), "WRONG_BASE_MODEL")


def _fusion_text(temperature: bytes) -> Change:
    def change(folder: Path) -> None:
        fields = json.loads((folder / FUSION_CONFIG).read_text())
        text = json.dumps(fields).encode()
        (folder / FUSION_CONFIG).write_bytes(
            text.replace(f'"temperature": {json.dumps(fields["temperature"])}'.encode(), temperature)
        )

    return change


def _piped(folder: Path) -> None:
    (folder / FUSION_WEIGHTS).unlink()
    os.mkfifo(folder / FUSION_WEIGHTS)


def _fusion_files() -> Iterator[BadArtifact]:
    def bad(name: str, change: Change, reason: str) -> BadArtifact:
        return BadArtifact(f"fusion: {name}", change, reason, noun="fusion")

    yield bad("no configuration", lambda f: (f / FUSION_CONFIG).unlink(), "CONFIG_MISSING")
    yield bad("no weights", lambda f: (f / FUSION_WEIGHTS).unlink(), "WEIGHTS_MISSING")
    yield bad(
        "weights a pipe",
        _piped,
        "NOT_A_REGULAR_FILE",
    )
    yield bad("weights cut short", lambda f: os.truncate(f / FUSION_WEIGHTS, 1000), "WEIGHTS_TRUNCATED")

    def nan(folder: Path) -> None:
        header, data = _split(folder, FUSION_WEIGHTS)
        _join(folder, header, struct.pack("<f", float("nan")) + data[4:], FUSION_WEIGHTS)

    yield bad("NaN in the weights", nan, "NOT_FINITE")

    def stranger(folder: Path) -> None:
        header, data = _split(folder, FUSION_WEIGHTS)
        first = next(key for key in header if key != "__metadata__")
        header["stranger.weight"] = header.pop(first)
        _join(folder, header, data, FUSION_WEIGHTS)

    yield bad("a stranger's tensor", stranger, "UNEXPECTED_TENSOR")
