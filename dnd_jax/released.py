"""Decoders in the published PyTorch code's format <-> our checkpoints.

    python -m dnd_jax.released --checkpoint=FILE.pth --config=experiments/configs/common_sense.py:ARC-c --out=WORKDIR
    python -m dnd_jax.released --workdir=WORKDIR --checkpoint=FILE.pth

The first makes a workdir that `dnd_jax.generate` takes, the second goes back. Names differ, and kernels, theirs
`[out, in, k, k]`, ours `[k, k, in, out]`; norm `[L, C]` and affine maps `[out, in]` are the same on both sides:

    "model.decoder.module_list.0.linear1.conv1w.weight"  <->  params["layers_0"]["width_conv_c"]
"""

import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np
import safetensors.numpy
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict

from dnd_jax import checkpoint_folders, checkpoints, cli, encoders, files, tokens, workdirs
from dnd_jax.adapters.architecture import spec_of_model
from dnd_jax.adapters.tensor_files import TensorFile
from dnd_jax.decoder import decoder_of, param_shapes
from dnd_jax.types import InputError, Params

NAMES = {
    "linear1.norm.weight": "norm/scale",
    "linear1.norm.bias": "norm/bias",
    "linear1.conv1w.weight": "width_conv_c",
    "linear1.conv1h.weight": "width_conv_l",
    "linear1.conv2h.weight": "height_conv_l",
    "linear1.conv2w.weight": "height_conv_c",
    "linear1.bias": "bias",
    "linear2.weight": "out_conv",
    "linear2.bias": "out_bias",
}
SHORTEN = {
    "down_proj.weight": "shorten/down_weight", "down_proj.bias": "shorten/down_bias",
    "gate_proj.weight": "shorten/gate_weight", "gate_proj.bias": "shorten/gate_bias",
}
PREFIX = "model.decoder.module_list."
NOT_DECODER = re.compile(r"criterion_weight$")


def params_from_torch(state: Mapping[str, np.ndarray]) -> Params:
    """Return the decoder's parameters from a state dict in the released checkpoints' names.

    Args:
      state: name -> array; names without the prefix `model.decoder.` are accepted too.

    Raises:
      InputError: a name that is no decoder parameter, or a layer that lacks one.
    """
    flat = {_path_of(name): _transposed(np.asarray(value), (2, 3, 1, 0))
            for name, value in state.items() if not NOT_DECODER.search(name)}
    layers = {path.split("/")[0] for path in flat}
    expected = {f"layers_{i}/{ours}": f"{PREFIX}{i}.{theirs}" for i in range(len(layers - {"shorten"}))
                for theirs, ours in NAMES.items()}
    if "shorten" in layers:
        expected |= {ours: theirs for theirs, ours in SHORTEN.items()}
    for path, name in expected.items():
        if path not in flat:
            raise InputError(f"state dict: {name} is missing, found {', '.join(sorted(layers))}")
    return unflatten_dict(flat, sep="/")


def _path_of(name: str) -> str:
    """Return where a parameter of the published code lies in our tree."""
    if (match := re.fullmatch(r"(?:.+\.)?((?:down|gate)_proj\.\w+)", name)) and match[1] in SHORTEN:
        return SHORTEN[match[1]]
    match = re.fullmatch(r"(?:model\.)?(?:decoder\.)?module_list\.(\d+)\.(.+)", name)
    if match is None or match[2] not in NAMES:
        raise InputError(f"state dict: {name!r} is not a parameter of the published decoder")
    return f"layers_{match[1]}/{NAMES[match[2]]}"


def params_to_torch(params: Params) -> dict[str, np.ndarray]:
    """Return the state dict in the released checkpoints' names; the inverse of `params_from_torch`."""
    theirs = {ours: name for name, ours in (NAMES | SHORTEN).items()}
    state = {}
    for path, value in flatten_dict(dict(params), sep="/").items():
        layer, ours = path.split("/", 1)
        name = theirs[path] if path in theirs else f"{PREFIX}{layer.removeprefix('layers_')}.{theirs[ours]}"
        state[name] = _transposed(np.asarray(value), (3, 2, 0, 1))
    return state


def _transposed(value: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    return np.ascontiguousarray(value.transpose(order)) if value.ndim == len(order) else value


# --- files -----------------------------------------------------------------------------------------------------------

# Run in a process of its own: a stranger's file may crash the reader or ask for any amount of memory, but not run code, since
# weights_only refuses that. A view of one number can claim to be terabytes, and becomes so when it is copied.
READ = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[3]),) * 2)
import torch
from safetensors.torch import save_file
state = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
for key in ("state_dict", "model_state_dict"):
    state = state.get(key, state) if isinstance(state, dict) else state
if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
    sys.exit(f"holds a {type(state).__name__}, expected a state dict: names and tensors")
tensors = {k: v.to(torch.float32, copy=True).contiguous() for k, v in state.items() if isinstance(v, torch.Tensor)}
if not tensors:
    sys.exit("holds no tensors, expected a state dict")
save_file(tensors, sys.argv[2])
"""
WRITE = """
import sys, torch
from safetensors.torch import load_file
torch.save(load_file(sys.argv[1]), sys.argv[2])
"""
READER_BYTES = 4 * 10**9  # of memory, beside three copies of the file: in its dtype, in float32, and in between
READER_SECONDS = 1800


def read_state(path: files.PathLike, max_bytes: int) -> dict[str, np.ndarray]:
    """Read a PyTorch state dict as float32 arrays.

    Raises:
      InputError: a missing file, one above `max_bytes`, one that is no state dict or holds anything but tensors, or that
        takes far more memory than its size.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"{path}: No such file")
    if (size := path.stat().st_size) > max_bytes:
        raise InputError(f"{path}: {size} bytes, at most {max_bytes}")
    with tempfile.TemporaryDirectory() as folder:
        converted = f"{folder}/state.safetensors"
        _run(READ, path, converted, str(READER_BYTES + 3 * size))
        try:
            with TensorFile(converted) as file:
                return file.read()
        except InputError as error:
            raise InputError(str(error).replace(converted, str(path))) from error


def write_state(path: files.PathLike, state: Mapping[str, np.ndarray]) -> None:
    """Write a PyTorch state dict."""
    with tempfile.TemporaryDirectory() as folder:
        safetensors.numpy.save_file(dict(state), f"{folder}/state.safetensors")
        _run(WRITE, f"{folder}/state.safetensors", f"{folder}/state.pth")
        files.copy(f"{folder}/state.pth", path)


def _run(code: str, source: files.PathLike, *words: str) -> None:
    command = [sys.executable, "-c", code, str(source), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=READER_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{source}: PyTorch takes longer than {READER_SECONDS} seconds") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        fault = next((line for line in reversed(said) if re.match(r"[\w.]*(Error|Exception)\b", line)), "")
        raise InputError(f"{source}: PyTorch doesn't take it as a state dict: {fault[:300]}" if fault else
                         f"{source}: {(said or [f'the reader ended with status {done.returncode}'])[-1][:300]}")


def import_checkpoint(config: ml_collections.ConfigDict, state: Mapping[str, np.ndarray], workdir: pathlib.Path) -> None:
    """Write a workdir of one checkpoint, at step 0, with the decoder that the config describes.

    Raises:
      InputError: a parameter of another shape than the config's decoder has, or a workdir with checkpoints; nothing is written.
    """
    shapes = config.get("model") or files.read_json(f"{config.base}/config.json")
    spec = spec_of_model(shapes, config.collect.rank, config.collect.target_modules)
    spec.config["base_model_name_or_path"] = config.base
    layout = tokens.plan(spec, config.export.chunk)
    width = config.model.condition_width if "model" in config else encoders.make(config.encoder).width
    decoder = decoder_of(config, config.encoder.length, width, layout.shape)
    params = params_from_torch(state)
    checkpoints.check_shapes("state dict", params, param_shapes(decoder),
                             "use the config that it was trained with, config.model included")
    about = {
        **decoder.to_json(), "config": cli.config_dict(config), "layout": layout.to_json(), "spec": spec.to_json(),
        "encoder": config.encoder.to_dict(), "encoder_sha256": None, "base": {"name": config.base, "sha256": "not recorded"},
        "carried": {}, "carried_sha256": None, "averaged": [], "form": config.condition.form, "runs_sha256": {}, "embeddings": {},
    }
    if checkpoint_folders.steps(workdir / "checkpoints"):
        raise InputError(f"{workdir}: holds checkpoints; import into another workdir")
    workdirs.claim(config, workdir)
    checkpointer = checkpoints.Checkpointer(workdir / "checkpoints", about)
    checkpointer.save(0, {"params": params}, {})
    checkpointer.close()


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, required=True, help="PyTorch file with the published decoder's state dict.")
    cli.define_config(required=False)
    flags.DEFINE_string("out", None, "Workdir to write, with --config.")
    flags.DEFINE_string("workdir", None, "Workdir whose best checkpoint is written to the PyTorch file.")
    flags.DEFINE_integer("max_gigabytes", 20, "Largest PyTorch file that is read.")


def main(args: Any) -> None:
    if bool(args.workdir) == bool(args.config and args.out):
        raise InputError("command line: expected either --config and --out, or --workdir")
    if args.workdir:
        step, params, _, _ = checkpoints.load_best(f"{args.workdir}/checkpoints")
        write_state(args.checkpoint, params_to_torch(params))
        print(f"{args.checkpoint}: step {step} of {args.workdir}")
    else:
        import_checkpoint(args.config, read_state(args.checkpoint, args.max_gigabytes * 10**9), pathlib.Path(args.out))
        print(f"{args.out}: the decoder of {args.checkpoint}")


if __name__ == "__main__":
    cli.run(main, define_flags)
