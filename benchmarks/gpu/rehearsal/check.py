# SPDX-License-Identifier: Apache-2.0
"""What runs in the rehearsal's environment, part by part; each prints its findings as JSON lines.

python -m benchmarks.gpu.rehearsal.check libraries|imports|engine|server --out FILE
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu.limited import append_row
from benchmarks.gpu.rehearsal import imports

MODULES = (
    "vllm.entrypoints.llm",
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.launchers.api_server.routers",
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.anthropic.api_router",
    "vllm.tool_parsers.hermes_tool_parser",
    "vllm.tool_parsers.llama_tool_parser",
    "vllm.parser.parser_manager",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.core",
    "vllm.v1.engine.core_client",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.triton_attn",
    "vllm.v1.attention.backends.flex_attention",
    "vllm.v1.spec_decode.ngram_proposer_gpu",
    "vllm.v1.structured_output.backend_xgrammar",
    "vllm.v1.structured_output.backend_guidance",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen3",
    "vllm.model_executor.layers.quantization.fp8",
    "vllm.model_executor.layers.quantization.kv_cache",
    "vllm.model_executor.warmup.kernel_warmup",
)
PACKAGES = (
    "vllm.compilation",
    "vllm.entrypoints.openai.chat_completion",
    "vllm.entrypoints.openai.completion",
    "vllm.entrypoints.openai.models",
    "vllm.entrypoints.openai.responses",
    "vllm.v1.core",
    "vllm.v1.metrics",
    "vllm.v1.sample",
    "vllm.v1.worker.gpu",
    "vllm_stateful",
    "benchmarks.gpu",
    "benchmarks.kernels",
    "benchmarks.models",
)
NOT_ON_A_GPU = ("vllm_stateful.adapters.cpu",)
EXTENSIONS = (
    "vllm._C_stable_libtorch",
    "vllm._moe_C_stable_libtorch",
    "vllm.vllm_flash_attn._vllm_fa3_C",
    "vllm.cumem_allocator",
    "vllm.fs_io_C",
    "vllm.spinloop",
)
OPTIONAL = ("vllm._moe_C_stable_libtorch",)
DRAFTS = {"method": "ngram_gpu", "num_speculative_tokens": 8}


class Findings:
    """What was tried and what went wrong, one row of the file each."""

    def __init__(self, out: Path, part: str) -> None:
        self.out, self.part = out, part

    def add(self, what: str, problem: str = "") -> None:
        append_row(self.out, {"part": self.part, "what": what, "problem": problem})

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """One step; its error is a finding, and what comes behind it is tried all the same."""
        try:
            yield
        except (Exception, SystemExit) as error:  # of any library, whatever it is
            traceback.print_exc()
            self.add(what, f"{type(error).__name__}: {error}"[:600])
        else:
            self.add(what)


def libraries(found: Findings) -> None:
    """Our library, and vLLM's extensions."""
    import torch

    from vllm_stateful.attention import ops

    with found.trying("our library"):
        if not ops.LIBRARY.is_file():
            raise FileNotFoundError(ops.LIBRARY)
        torch.ops.load_library(str(ops.LIBRARY))
        assert torch.ops.vllm_stateful.num_devices() == 0
    with found.trying("the platform is CUDA"):
        from vllm.platforms import current_platform

        assert current_platform.is_cuda(), type(current_platform).__name__
        assert current_platform.get_device_capability().to_int() == 90
    for name in EXTENSIONS:
        if name not in OPTIONAL or imports._is_there(name):
            with found.trying(name):
                importlib.import_module(name)
    with found.trying("FlashAttention 3"):
        from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

        assert torch.ops._vllm_fa3_C.fwd
        assert is_fa_version_supported(3), "vLLM does not find it usable"
    with found.trying("an operation of each of vLLM's libraries"):
        assert torch.ops._C.rms_norm
        assert torch.ops._C_cache_ops.reshape_and_cache_flash


def all_modules() -> list[str]:
    """The modules named above, and all of the packages'."""
    names = list(MODULES)
    for package in PACKAGES:
        names.append(package)
        module = importlib.import_module(package)
        walked = pkgutil.walk_packages(module.__path__, f"{package}.", onerror=_is_found_later)
        names += [each.name for each in walked]
    libraries = {"vllm_stateful._C"}  # of operations, which `libraries` loads
    return [name for name in names if not name.endswith("__main__") and name not in libraries]


def _is_found_later(name: str) -> None:
    """A package that does not import is a finding of `import_all`, which comes to it too."""


def import_all(found: Findings) -> None:
    """Import them, then read what all that was loaded imports lazily."""
    may_be_missing = imports.allowed()
    for name in all_modules():
        if is_allowed(name, may_be_missing):
            continue
        try:
            importlib.import_module(name)
        except ImportError as error:
            if (error.name or "").partition(".")[0] not in may_be_missing:
                found.add(f"import {name}", f"{type(error).__name__}: {error}"[:300])
        except Exception as error:  # of any module, whatever it is
            found.add(f"import {name}", f"{type(error).__name__}: {error}"[:300])
        else:
            found.add(f"import {name}")
    read_all(found)


def read_all(found: Findings) -> None:
    """The import statements of all modules that this process has loaded."""
    may_be_missing = imports.allowed()
    loaded = [name for name in sys.modules if name.partition(".")[0] in imports.OURS]
    lacks = imports.missing(loaded, imports.is_installed, look_up_names=True)
    for name, each in lacks.items():
        if not is_allowed(name, may_be_missing):
            kind = "lazily" if each.is_lazy else "at once"
            found.add(f"missing {name}", f"{each.where}:{each.line} imports it, {kind}")
    found.add(f"the import statements of {len(loaded)} modules")


def is_allowed(name: str, may_be_missing: dict[str, str]) -> bool:
    """A name, or any package that it is in."""
    parts = name.replace(":", ".").split(".")
    return name in may_be_missing or any(
        ".".join(parts[:end]) in may_be_missing for end in range(1, len(parts) + 1)
    )


def requirements(found: Findings) -> None:
    """Whether all that was packed finds what its own metadata asks for."""
    from importlib.metadata import PackageNotFoundError, distributions, version

    from packaging.requirements import Requirement

    may_be_missing = imports.allowed()
    site = Path(os.environ["SITE"])
    for packed in distributions(path=[str(site)]):
        if packed.name == "vllm":
            continue  # it asks for all that any feature imports
        for text in packed.requires or ():
            need = Requirement(text)
            if need.marker and not need.marker.evaluate({"extra": ""}):
                continue
            try:
                problem = "" if version(need.name) in need.specifier else version(need.name)
            except PackageNotFoundError:
                problem = "missing"
            if problem and need.name.lower().replace("-", "_") not in may_be_missing:
                found.add(f"{packed.name} needs {need}", problem)
    found.add("the requirements of all wheels")


def engine(found: Findings) -> None:
    """Configurations, and what of an engine can be made without a device."""
    import torch

    from benchmarks.models.dummy import write_config

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_config(folder, "llama-8b")
        variants: dict[str, dict[str, Any]] = {
            "stock": {},
            "eager": {"enforce_eager": True},
            "drafts": {"speculative_config": dict(DRAFTS)},
            "fp8 cache": {"kv_cache_dtype": "fp8"},
        }
        for name, added in variants.items():
            with found.trying(f"configuration: {name}"):
                config = configured(folder, **added)
                assert config.device_config.device_type == "cuda"
                model_and_attention(config)
        with found.trying("a model of two layers, on no device"):
            write_config(folder, "tiny")
            model_of_no_device(configured(folder), torch.device("meta"))
    read_all(found)


def configured(folder: Path, **added: Any) -> Any:
    """What vLLM makes of its arguments."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=8192,
        **added,
    ).create_engine_config()


def model_and_attention(config: Any) -> None:
    """The classes that the worker would take."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import get_model_architecture
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.selector import get_attn_backend
    from vllm.v1.executor import Executor

    with set_current_vllm_config(config):
        get_model_architecture(config.model_config)
        get_model_loader(config.load_config)
        cache = config.cache_config.cache_dtype
        backend = get_attn_backend(128, config.model_config.dtype, cache)
        backend.get_impl_cls()
        backend.get_builder_cls()
        print("attention:", backend, "runner V2:", config.use_v2_model_runner, flush=True)
    resolve_obj_by_qualname(config.parallel_config.worker_cls)
    Executor.get_class(config)


def model_of_no_device(config: Any, device: Any) -> None:
    """All layers of a model, without memory for them."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.network_utils import get_open_port

    with set_current_vllm_config(config):
        address = f"tcp://127.0.0.1:{get_open_port()}"
        init_distributed_environment(1, 0, address, 0, backend="gloo")
        initialize_model_parallel(1, 1)
        before = torch.get_default_dtype()
        torch.set_default_dtype(config.model_config.dtype)
        try:
            with device:
                model = initialize_model(vllm_config=config)
        finally:
            torch.set_default_dtype(before)
    print(sum(weight.numel() for weight in model.parameters()), "weights", flush=True)


def server(found: Findings) -> None:
    """The command line and the application of a server, structured outputs, a tokenizer."""
    from benchmarks.models.dummy import write_config

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_config(folder, "llama-8b")
        replay = Path(os.environ["REPLAY"])
        for file in replay.glob("*.*"):
            if file.suffix != ".jsonl":
                (folder / file.name).write_bytes(file.read_bytes())
        plugin = ["--plugin", "stateful"] if os.environ.get("VLLM_STATEFUL") else []
        with found.trying("the application"):
            application(folder, plugin)
        if (folder / "tokenizer.json").is_file():
            with found.trying("tokenizer, chat template and parser"):
                rendered(folder)
            with found.trying("structured outputs"):
                structured(folder)
        else:
            found.add("tokenizer", "no tokenizer is in the pack")
        with found.trying("metrics"):
            metrics(folder)
    read_all(found)


def application(folder: Path, plugin: list[str]) -> None:
    """What `vllm serve` would listen with."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = ["--model", str(folder), "--load-format", "dummy", *plugin]
    arguments += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    validate_parsed_serve_args(parsed)
    app = build_app(parsed, ("generate",), configured(folder).model_config)
    print(len(app.routes), "routes", flush=True)


def rendered(folder: Path) -> None:
    """One conversation as tokens, by vLLM's own tokenizer, and its tool parser."""
    from vllm.tokenizers import get_tokenizer
    from vllm.tool_parsers import ToolParserManager

    tokenizer = get_tokenizer(str(folder))
    said = [{"role": "user", "content": "What is the time?"}]
    assert tokenizer.apply_chat_template(said, tokenize=True)
    ToolParserManager.get_tool_parser("hermes")(tokenizer)


def structured(folder: Path) -> None:
    """A grammar by xgrammar."""
    import xgrammar
    from vllm.tokenizers import get_tokenizer
    from vllm.v1.structured_output import StructuredOutputManager

    config = configured(folder)
    config.model_config.skip_tokenizer_init = False
    StructuredOutputManager(config)
    info = xgrammar.TokenizerInfo.from_huggingface(get_tokenizer(str(folder)), vocab_size=128256)
    xgrammar.GrammarCompiler(info).compile_json_schema('{"type": "object"}')


def metrics(folder: Path) -> None:
    """The counters of a server."""
    from prometheus_client import generate_latest
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    PrometheusStatLogger(configured(folder, speculative_config=dict(DRAFTS)))
    assert b"vllm:" in generate_latest(get_prometheus_registry())


PARTS: dict[str, Callable[[Findings], None]] = {
    "libraries": libraries,
    "imports": import_all,
    "requirements": requirements,
    "engine": engine,
    "server": server,
}


def main() -> int:
    """One part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    PARTS[args.part](Findings(args.out, args.part))
    return 0


if __name__ == "__main__":
    sys.exit(main())
