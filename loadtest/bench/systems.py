"""The systems of a benchmark: the module that drives each, where it is installed and what it can run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fusionserve.loadtest.bench.artifacts import BenchFiles, make_gguf_files
from fusionserve.loadtest.bench.protocol import BASE, FUSION, MIXED, SAMPLED, Setup
from fusionserve.loadtest.bench.system_process import SystemFailedError
from fusionserve.loadtest.bench.workloads import BenchWorkload
from fusionserve.loadtest.model_shapes import SHAPES

OURS = "ours"
OURS_BARE = "ours-no-adapters"
OURS_INT8 = "ours-int8"
OURS_INT4 = "ours-int4"
OURS_WIRE = "ours-grpc"
OURS_WIRE_BY_4 = "ours-grpc-by-4"
TRANSFORMERS = "transformers"
PEFT = "peft"
VLLM = "vllm"
VLLM_LORA = "vllm-lora"
LLAMA_CPP = "llama.cpp"
LLAMA_CPP_Q8 = "llama.cpp-q8_0"

_IN_GGUF = {"llama", "qwen2"}  # architectures that gguf_files.py converts

_DRIVERS = "fusionserve.loadtest.bench.drivers"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class System:
    """A driver module, the interpreter it runs on, and the kinds of round it can run."""

    name: str
    driver: str
    kinds: tuple[str, ...]
    environment_name: str = ""  # the peer's folder under build/peers; none: this interpreter
    options: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    gguf_type: str = ""  # llama.cpp: the type of its matrices
    is_bfloat16: bool = True

    def process_variables(self, peers: Path) -> dict[str, str]:
        """Its environment variables, with the peer's own folder in place of `{environment}`."""
        environment = (peers / self.environment_name / ".venv").absolute()
        return {name: value.format(environment=environment) for name, value in self.variables.items()}

    @property
    def module(self) -> str:
        """What `python -m` runs."""
        return f"{_DRIVERS}.{self.driver}"

    def python(self, peers: Path) -> Path:
        """The interpreter, which is not there if the peer was not installed."""
        if not self.environment_name:
            return Path(sys.executable)
        return peers / self.environment_name / ".venv" / "bin" / "python"


_VLLM_VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the driver's process: nothing to send between steps
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; W3, the largest, needs 0.4
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "LD_PRELOAD": "{environment}/lib/libiomp5.so",  # its manual asks for it; a tenth faster with adapters
}

_OUR_VARIABLES = {"OMP_WAIT_POLICY": "PASSIVE"}  # as `fusionserve serve` sets it for itself

SYSTEMS = {
    each.name: each
    for each in (
        System(
            name=OURS,
            driver="in_process",
            kinds=(BASE, MIXED, FUSION, SAMPLED),
            options={"adapters": "yes"},
            variables=_OUR_VARIABLES,
        ),
        System(
            name=OURS_BARE,
            driver="in_process",
            kinds=(BASE,),
            options={"adapters": "no"},
            variables=_OUR_VARIABLES,
        ),
        *(
            System(
                name=name,
                driver="in_process",
                kinds=(BASE, MIXED),
                options={"adapters": "yes", "quantize": bits},
                variables=_OUR_VARIABLES,
                is_bfloat16=False,
            )
            for name, bits in ((OURS_INT8, "int8"), (OURS_INT4, "int4"))
        ),
        System(name=OURS_WIRE, driver="wire", kinds=(BASE, MIXED, FUSION, SAMPLED)),
        System(name=OURS_WIRE_BY_4, driver="wire", kinds=(BASE, MIXED), options={"stream_interval": "4"}),
        System(name=TRANSFORMERS, driver="hugging_face", kinds=(BASE, SAMPLED), options={"peft": "no"}),
        System(name=PEFT, driver="hugging_face", kinds=(MIXED,), options={"peft": "yes"}),
        System(
            name=VLLM,
            driver="vllm_cpu",
            kinds=(BASE, SAMPLED),
            environment_name="vllm",
            options={"enable_lora": "no"},
            variables=_VLLM_VARIABLES,
        ),
        System(
            name=VLLM_LORA,
            driver="vllm_cpu",
            kinds=(BASE, MIXED),
            environment_name="vllm",
            options={"enable_lora": "yes"},
            variables=_VLLM_VARIABLES,
        ),
        System(
            name=LLAMA_CPP,
            driver="llama_cpp",
            kinds=(BASE, MIXED),
            environment_name="llama_cpp",
            gguf_type="bf16",
        ),
        System(
            name=LLAMA_CPP_Q8,
            driver="llama_cpp",
            kinds=(BASE,),
            environment_name="llama_cpp",
            gguf_type="q8_0",
            is_bfloat16=False,
        ),
    )
}


def make_setup(system: System, workload: BenchWorkload, files: BenchFiles, num_threads: int) -> Setup:
    """What the system's process is told; makes the files that only this system needs."""
    options = dict(system.options)
    if system.gguf_type:
        if SHAPES[workload.shape].model_type not in _IN_GGUF:
            raise SystemFailedError(f"{workload.shape} is not converted to GGUF")
        make_gguf_files(files, system.gguf_type)
        options["gguf"] = str(files.gguf_model(system.gguf_type))
        options["gguf_adapters"] = " ".join(str(path) for path in files.gguf_adapters)
    return Setup(
        model=str(files.model),
        adapters=[str(path) for path in files.adapters],
        fusion=str(files.fusion),
        num_streams=workload.num_streams,
        prompt_tokens=workload.prompt_tokens,
        new_tokens=workload.new_tokens,
        rank=workload.rank,
        kv_bytes_per_token=workload.model_size().kv_bytes_per_token,
        num_threads=num_threads,
        options=options,
    )
