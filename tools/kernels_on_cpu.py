"""The Triton kernels of mamba_ssm against our reference, without a GPU: Triton's interpreter runs their own source.

    pip install triton einops
    MAMBA_SKIP_CUDA_BUILD=TRUE pip download --no-deps --no-binary :all: --no-build-isolation mamba-ssm
    tar xf mamba_ssm-*.tar.gz && python tools/kernels_on_cpu.py mamba_ssm-*/

Prints one row for each mixer and dtype: the largest relative error of outputs and carried states over a stream (a
start, ticks of several tokens from a carried state, single tokens) and of gradients; exits with 1 where one is beyond
its bound. What it cannot say: Mamba-1's scan over a sequence is CUDA C++ and is not run; bfloat16 is float16 here (the
interpreter has no arithmetic for bfloat16); how a GPU rounds and how fast it is. Takes about two minutes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch

from vla_nodes import cli
from vla_nodes.policy.mamba import kernels, mixers

BOUNDS = {torch.float32: (1e-4, 1e-3), torch.float16: (1e-2, 3e-2)}  # of a stream, of gradients
CUTS = (0, 20, 30, 31, 32, 40)  # tokens of a stream, from call to call


def interpreted(source: Path) -> None:
    """Makes ``mamba_ssm``'s Triton part importable on a CPU; CommandError says what is missing."""
    try:
        import triton
    except ImportError:
        raise cli.CommandError("triton is not installed: pip install triton einops") from None
    folder = source / "mamba_ssm"
    if not (folder / "ops" / "triton" / "ssd_combined.py").is_file():
        raise cli.CommandError(f"{source}: no unpacked source distribution of mamba-ssm")
    package = types.ModuleType("mamba_ssm")  # its own __init__ demands the compiled scan
    package.__path__ = [str(folder)]
    convolution = types.ModuleType("causal_conv1d")
    convolution.causal_conv1d_fn = convolution.causal_conv1d_update = None
    compiled = types.ModuleType("selective_scan_cuda")
    sys.modules |= {"mamba_ssm": package, "causal_conv1d": convolution, "selective_scan_cuda": compiled}

    class First:
        """In place of the autotuner, which times kernels on a GPU: the first configuration."""

        def __init__(self, kernel, configs) -> None:
            self.kernel, self.configs, self.best_config = kernel, configs, configs[0]

        def __getitem__(self, grid):
            first = self.best_config

            def call(*args, **kwargs) -> None:
                if first.pre_hook:
                    first.pre_hook({**dict(zip(self.kernel.arg_names, args, strict=False)), **kwargs})
                self.kernel[lambda meta: grid({**meta, **first.kwargs})](*args, **kwargs, **first.kwargs)

            return call

    triton.autotune = lambda configs, key, **_: lambda kernel: First(kernel, configs)
    torch.cuda.device = lambda _: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda _: types.SimpleNamespace(multi_processor_count=2)


def stream(core: mixers.SequenceCore, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs and the last state of a stream in calls of several lengths."""
    state, out = None, []
    with torch.no_grad():
        for begin, end in zip(CUTS, CUTS[1:], strict=False):
            y, state = core(x[:, begin:end], state)
            out.append(y)
    parts = {f"state {layer}.{k}": t for layer, kept in enumerate(state) for k, t in enumerate(kept)}
    return {"output": torch.cat(out, 1), **parts}


def gradients(core: mixers.SequenceCore, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of all weights, of random sums over two calls of which the second begins with the first's state."""
    core.zero_grad()
    y, state = core(x[:, :24])
    tail, _ = core(x[:, 24:], mixers.detach(state))
    wanted = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    (torch.cat([y, tail], 1).float() * wanted).sum().backward()
    return {name: p.grad.clone() for name, p in core.named_parameters()}


def worst(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest error relative to the largest value of a tensor, and the tensor's name."""
    errors = {name: float((t.float() - right[name].float()).abs().max() / right[name].float().abs().max())
              for name, t in found.items()}  # fmt: skip
    name = max(errors, key=lambda key: (errors[key] != errors[key], errors[key]))  # NaN is the worst
    return errors[name], name


def compare(options: cli.Options) -> int:
    """The command."""
    interpreted(options.source)
    torch.set_num_threads(1)
    within = {"on": False}
    kernels.use_for = lambda x, scan=False: within["on"] and not scan
    kernels.CHUNK, good = 16, True  # several chunks in a short sequence
    print(f"{'mixer':9}{'dtype':16}{'stream':>10}{'gradients':>12}  worst")
    for mixer in ("mamba2", "mamba1"):
        for dtype, bounds in BOUNDS.items():
            torch.manual_seed(3)
            core = mixers.SequenceCore(mixer=mixer, d_model=32, n_layer=2, d_state=16, headdim=16)
            for p in core.parameters():
                p.data.add_(0.1 * torch.randn_like(p))  # as if trained: away from how they begin
            core = core.to(dtype).eval()
            x = torch.randn(1, CUTS[-1], 32).to(dtype)
            found = []
            for measured in (stream, gradients)[: 2 if mixer == "mamba2" else 1]:
                right, tried = None, None
                for within["on"] in (False, True):
                    right, tried = tried, measured(core, x)
                found.append(worst(tried, right))
            good &= all(error <= bound for (error, _), bound in zip(found, bounds, strict=False))
            errors = "".join(f"{error:>{width}.1e}" for (error, _), width in zip(found, (10, 12), strict=False))
            print(f"{mixer:9}{str(dtype)[6:]:16}{errors:22}  {', '.join(name for _, name in found)}", flush=True)
    print("within bounds" if good else "BEYOND THE BOUNDS")
    return cli.ExitStatus.DONE if good else cli.ExitStatus.FAILED


command = cli.Command(
    "kernels_on_cpu",
    """
    The Triton kernels of mamba_ssm against our reference, without a GPU: Triton's interpreter runs their own source.
    """,
    compare,
    cli.argument("SOURCE", "folder of mamba-ssm's unpacked source distribution", type=cli.PATH),
    examples="""
    python tools/kernels_on_cpu.py mamba_ssm-2.2.5/
    """,
    program="python tools/kernels_on_cpu.py",
)


if __name__ == "__main__":
    sys.exit(cli.main(command))
