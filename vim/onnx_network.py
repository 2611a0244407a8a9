"""An ONNX file as a network of torch, for the evaluation of `main.py`."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from flags import UsageError, is_given
from labels import class_names_for
from onnx_classifier import refuse_others, transform_of
from onnx_session import OnnxError, OnnxModel, is_onnx, open_session

__all__ = ["OnnxError", "OnnxNetwork", "is_onnx", "network_for_evaluation", "refuse_training"]

FOLDER_NAMES = "checkpoint_names"  # metadata: the checkpoint's own names, where those for people are others


class OnnxNetwork(nn.Module):
    """Runs an ONNX file on pictures of torch, on the CPU; it has no weights that torch knows of."""

    def __init__(self, model: OnnxModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the logits, (b, classes) fp32, of prepared pictures, (b, 3, h, w) fp32."""
        return torch.from_numpy(self.model.run(pictures.numpy()))

    @property
    def folder_names(self) -> list[str] | None:
        """Names of the class folders by number; None if the file has only names that were made up for people."""
        names = self.model.class_names
        if FOLDER_NAMES in self.model.metadata:
            own = self.model.said(FOLDER_NAMES)
            if isinstance(own, list) and len(own) == len(names) and all(isinstance(name, str) for name in own):
                return own
            raise OnnxError(f"The {FOLDER_NAMES} in {self.model.source} are not {len(names)} names; export it again.")
        made_up = class_names_for(len(names), labels_file=None, checkpoint_names=None)
        return None if names == made_up else names


def refuse_training(args: argparse.Namespace) -> None:
    """Raise UsageError if training is to begin or to go on from an ONNX file."""
    for flag, source in (("--resume", args.resume), ("--finetune", args.finetune)):
        if not args.eval and is_onnx(source):
            raise UsageError(
                f"{flag} {source} is an ONNX file, which can be evaluated (--eval) but not trained; name the "
                "checkpoint that it was made of."
            )


def network_for_evaluation(args: argparse.Namespace, source: str) -> OnnxNetwork:
    """Open the ONNX file `source`, and set args.model, args.input_size and args.device to what it is and runs on.

    Raises:
        UsageError: the command line asks for what the file is not.
        OnnxError: the file cannot be used.
    """
    if is_given(args, "device") and args.device != "cpu":
        raise UsageError(f"an ONNX file is evaluated on the CPU here: leave --device {args.device} away.")
    if args.if_amp:
        raise UsageError("an ONNX file has its dtypes in it: leave --if_amp away.")
    model = open_session(source, threads=torch.get_num_threads())
    refuse_others(
        model,
        model_name=args.model if is_given(args, "model") else None,
        img_size=args.input_size if is_given(args, "input_size") else None,
        size_flag="--input-size",
    )
    transform_of(model)  # refuses pictures prepared in another way
    height, width = model.size
    args.model, args.input_size, args.device = model.name, height if height == width else (height, width), "cpu"
    return OnnxNetwork(model)
