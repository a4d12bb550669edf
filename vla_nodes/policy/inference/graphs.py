"""Exported graphs on disk: where they are kept, how they are written, and how each library opens and calls them.

A folder per checkpoint content and library version: `<checkpoint>/engines/<library>-<digest>/`, or below
$XDG_CACHE_HOME/vla_nodes where that is read-only. It appears complete or not at all, and old ones are removed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_nodes.policy.inference.quantize import QuantisedConv

log = logging.getLogger(__name__)
SUFFIX = {"openvino": ".xml", "onnxruntime": ".onnx"}
PARTS = ("vision", "core")
KEPT = 6  # folders of one library in one place
COPIED = 1 << 20  # bytes; a larger input or output of OpenVINO is attached, not copied
MAX_ONNX_BYTES = (2 << 30) - (64 << 20)  # one protobuf file holds no more
Graph = Callable[[tuple], list[Tensor]]  # inputs in the order of export -> outputs in the order of export


def version(name: str) -> str:
    """Of an installed library, "" when it is not there."""
    if importlib.util.find_spec(name) is None:
        return ""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a build under another name, onnxruntime-openvino for one
        return "unknown"


@lru_cache(maxsize=1)
def exact_int8() -> bool:
    """Whether this processor sums 8-bit products in 32 bits. Older x86 ones saturate at 16 and give other numbers."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features"))).split()
    except (OSError, StopIteration):
        return False
    return bool({"avx512_vnni", "avx_vnni", "asimddp"} & set(flags))


def digest(name: str, model: nn.Module, ranges: dict | None = None) -> str:
    """Changes with a weight, a size, the 8-bit ranges, the model's source or the library: the graph is then another."""
    total = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        total.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()))
    total.update(repr((model.config, model.contract, sorted((ranges or {}).items()))).encode())
    for source in sorted(Path(__file__).parent.parent.rglob("*.py")):
        total.update(source.read_bytes())
    total.update(f"{name} {version(name)} torch {torch.__version__}".encode())
    return total.hexdigest()[:24]


def folder_for(name: str, model: nn.Module, checkpoint: Path | None, ranges: dict | None = None) -> Path:
    """Where the graphs are, or will be; an existing folder is preferred wherever it is."""
    leaf = f"{name}-{'int8' if ranges else 'f32'}-{digest(name, model, ranges)}"
    places = [Path(checkpoint) / "engines"] if checkpoint is not None else []
    places.append(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vla_nodes" / "engines")
    for place in places:
        if complete(name, place / leaf):
            return place / leaf
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return place / leaf
        except OSError as error:
            log.info("exported graphs cannot be kept in %s (%s)", place, error.strerror)
    log.warning("exported graphs can be kept nowhere (%s): every start exports anew", ", ".join(map(str, places)))
    return Path(tempfile.mkdtemp(prefix="vla_nodes_engine_")) / leaf


def complete(name: str, folder: Path) -> bool:
    return all((folder / part).with_suffix(SUFFIX[name]).is_file() for part in PARTS)


def write(name: str, folder: Path, parts: dict[str, tuple[nn.Module, tuple]], anew: bool = False) -> Path:
    """Exports all parts into a new folder and moves it into place, over an old one where `anew`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        for part, (module, inputs) in parts.items():
            EXPORTERS[name](module, inputs, fresh / part)
        fresh.chmod(0o755)
        if anew:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(fresh, folder)
        except OSError:  # another process was first
            if not complete(name, folder):
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    same = sorted(folder.parent.glob(f"{name}-*"), key=lambda p: p.stat().st_mtime, reverse=True)
    for old in same[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def open_graph(name: str, path: Path, threads: int, precision: str) -> Graph:
    return OPENERS[name](path.with_suffix(SUFFIX[name]), max(1, threads), precision)


# -- OpenVINO --------------------------------------------------------------------------------------------------------
def openvino_silent() -> Any:
    """The library, without its telemetry: importing it would report to a web service, and a robot does not."""
    if "openvino" not in sys.modules and "openvino_telemetry" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # an ImportError, for which it has a stub
        try:
            import openvino
        finally:
            del sys.modules["openvino_telemetry"]
    import openvino

    return openvino


def export_openvino(module: nn.Module, inputs: tuple, path: Path) -> None:
    openvino = openvino_silent()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's: all shapes here are fixed on purpose
        graph = openvino.convert_model(module, example_input=inputs, input=[tuple(t.shape) for t in inputs])
    openvino.save_model(graph, path.with_suffix(".xml"), compress_to_fp16=False)


def open_openvino(path: Path, threads: int, precision: str) -> Graph:
    """The CPU plug-in takes bf16 by itself where the processor has it, so the precision is always said."""
    openvino = openvino_silent()
    precision = "f32" if precision == "int8" else precision  # of what the graph does not already do in integers
    core = openvino.Core()
    model = core.read_model(str(path))
    names = [port.get_node().get_friendly_name() for port in model.inputs]
    origins = [port.get_node().input_value(0).get_node() for port in model.outputs]
    # An output that is an input must get no buffer: OpenVINO would read the input from it. It is given back by hand.
    passed = {i: names.index(o.get_friendly_name()) for i, o in enumerate(origins) if o.get_type_name() == "Parameter"}
    compiled = core.compile_model(model, "CPU", {
        "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False})  # fmt: skip
    request = compiled.create_infer_request()

    def attach(setter: Callable, i: int, array: np.ndarray) -> np.ndarray:
        setter(i, openvino.Tensor(array, shared_memory=True))
        return array

    # Attaching an array costs more than copying a small one, so those have a buffer for good. States are values: what
    # is returned is never written again.
    def buffers(ports: Any, setter: Callable, left_out: Collection[int] = ()) -> list[np.ndarray | None]:
        empty = [np.zeros(tuple(port.shape), port.element_type.to_dtype()) for port in ports]
        kept = [a.nbytes <= COPIED and i not in left_out for i, a in enumerate(empty)]
        return [attach(setter, i, a) if keep else None for i, (a, keep) in enumerate(zip(empty, kept, strict=True))]

    sources = buffers(compiled.inputs, request.set_input_tensor)
    results = buffers(compiled.outputs, request.set_output_tensor, passed)
    large = [(i, tuple(port.shape), port.element_type.to_dtype()) for i, port in enumerate(compiled.outputs)
             if results[i] is None and i not in passed]  # fmt: skip

    def call(inputs: tuple) -> list[Tensor]:
        held = []  # until the call is over
        for i, (buffer, tensor) in enumerate(zip(sources, inputs, strict=True)):
            if buffer is None:
                held.append(attach(request.set_input_tensor, i, tensor.contiguous().numpy()))
            else:
                buffer[...] = tensor.numpy()
        fresh = {i: attach(request.set_output_tensor, i, np.empty(shape, kind)) for i, shape, kind in large}
        request.infer()
        fresh |= {i: inputs[j].clone().numpy() for i, j in passed.items()}
        return [torch.from_numpy(fresh[i] if a is None else a.copy()) for i, a in enumerate(results)]

    return call


# -- onnxruntime -----------------------------------------------------------------------------------------------------
def export_onnxruntime(module: nn.Module, inputs: tuple, path: Path) -> None:
    if sum(p.numel() for p in module.parameters()) * 4 > MAX_ONNX_BYTES:
        raise ValueError("the policy is larger than one ONNX file may be")
    if any(isinstance(part, QuantisedConv) for part in module.modules()):
        raise ValueError("onnxruntime runs this policy in f32 only, not in int8")
    names = [f"in{i}" for i in range(len(inputs))]
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # misses torchvision
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, inputs, dynamo=True, opset_version=20, input_names=names, verbose=False)
    assert program is not None  # with dynamo=True there is one
    program.save(path.with_suffix(".onnx"), external_data=False)


def open_onnxruntime(path: Path, threads: int, precision: str) -> Graph:
    import onnxruntime

    if precision != "f32":
        raise ValueError(f"onnxruntime runs this policy in f32 only, not in {precision}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the rest of the robot needs its cores
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = {entry.name for entry in session.get_inputs()}  # an input nothing depends on is dropped by the exporter

    def call(inputs: tuple) -> list[Tensor]:
        arrays = {f"in{i}": t.numpy() for i, t in enumerate(inputs) if f"in{i}" in taken}
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return call


EXPORTERS = {"openvino": export_openvino, "onnxruntime": export_onnxruntime}
OPENERS = {"openvino": open_openvino, "onnxruntime": open_onnxruntime}
