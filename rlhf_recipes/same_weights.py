"""Whether two model folders hold the same weights, where one of them may be packed by bitsandbytes.

Some matrices are compared. Packed ones are de-quantized, and ours quantized and de-quantized in the same way: equal
weights give equal numbers, while the step of a packed number hides what training moved less than it (a change of one
percent of the deviation of the weights turns about one NF4 number in 25).
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_recipes.errors import Refusal, first_line

if TYPE_CHECKING:
    from torch import Tensor

MATRICES = 8
# Of the values of a matrix that must agree: a kernel may round another way where two numbers are as near.
SHARE = 0.995
CLOSE = 0.01  # relative: float16 and bfloat16 of one number differ by less
HALF_A_STEP = 0.57  # of 127, with what float16 rounds


def compare(ours: Path, theirs: Path) -> tuple[int, str | None]:
    """How many matrices were compared, and the first that differs with the share of its values that agree.

    Args:
        ours, theirs: folders with weights in safetensors; those of `theirs` may be packed in 4 or 8 bit. 0 matrices
            are compared where a folder has none, or they are packed in another way.

    Raises:
        Refusal: a file cannot be read.
    """
    mine, other = _Folder(ours), _Folder(theirs)
    names = [name for name in mine.files if name.endswith(".weight") and other.can_compare(name, mine.shape(name))]
    names = sorted(names)[:: max(1, len(names) // MATRICES)][:MATRICES]
    for name in names:
        share = other.share_equal(name, mine.tensor(name))
        if share < SHARE:
            return len(names), f"{name} ({share:.1%} of its values agree)"
    return len(names), None


class _Folder:
    """The tensors of a folder, by name."""

    def __init__(self, folder: Path):
        self.files: dict[str, Path] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self.files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
            self.files = {name: path for name, path in self.files.items() if path.is_file()}
        elif (folder / "model.safetensors").is_file():
            self.files = dict.fromkeys(_opened(folder / "model.safetensors").keys(), folder / "model.safetensors")

    def tensor(self, name: str) -> "Tensor":
        return _opened(self.files[name]).get_tensor(name)

    def shape(self, name: str) -> list[int]:
        return _opened(self.files[name]).get_slice(name).get_shape()

    def can_compare(self, name: str, shape: list[int]) -> bool:
        if name not in self.files or len(shape) != 2:
            return False
        return self._state(name) != {} or self.shape(name) == shape

    def share_equal(self, name: str, ours: "Tensor") -> float:
        """The share of the values of a matrix that are those of ours."""
        import torch
        from bitsandbytes import functional

        packed, scales = self.tensor(name), f"{name.removesuffix('.weight')}.SCB"
        if packed_as := self._state(name):
            state = functional.QuantState.from_dict(packed_as, torch.device("cpu"))
            theirs = functional.dequantize_4bit(packed, state)
            how = {"blocksize": state.blocksize, "quant_type": state.quant_type, "compress_statistics": state.nested}
            ours = functional.dequantize_4bit(*functional.quantize_4bit(ours.to(state.dtype), **how))
        elif scales in self.files:
            steps = self.tensor(scales).float()[:, None] / 127
            return ((ours.float() / steps - packed).abs() < HALF_A_STEP).float().mean().item()
        else:
            theirs = packed
        if theirs.shape != ours.shape:
            return 0.0
        return torch.isclose(ours.float(), theirs.float(), rtol=CLOSE, atol=1e-8).float().mean().item()

    def _state(self, name: str) -> dict[str, "Tensor"]:
        """What bitsandbytes keeps beside a matrix in 4 bit."""
        named = [each for each in self.files if each.startswith(f"{name}.")]
        has_state = any("quant_state.bitsandbytes__" in each for each in named)
        return {each.removeprefix(f"{name}."): self.tensor(each) for each in named} if has_state else {}


def _opened(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise Refusal(f"{path}: cannot be read ({first_line(error)}). Fetch or save it again.") from error
