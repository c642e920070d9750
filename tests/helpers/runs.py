# SPDX-License-Identifier: Apache-2.0
"""Tiny runs of the whole pipeline, as a person types them."""

import json
import sys

import torch
from helpers.networks import Residual, with_own_statistics
from PIL import Image

from zsq import cli

FEW = [
    "--set", "synthesis.images=16", "--set", "synthesis.batch=8", "--set", "synthesis.steps=4",
    "--set", "tuning.steps=4", "--set", "tuning.batch=8", "--no-compile", "--precision", "fp32",
    "--no-report",
]  # fmt: skip
NORMALISATION = ["--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]
SHAPE = ["--input-shape", "3,8,8"]


def write_model(folder):
    """Export a small network to ``net.pt2``."""
    torch.manual_seed(0)
    module = with_own_statistics(Residual())
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "net.pt2")
    return str(folder / "net.pt2")


def write_images(folder, count=12):
    """Write an ImageFolder of the model's five classes, 8 x 8; two of them have no images."""
    generator = torch.Generator().manual_seed(0)
    for label in range(5):
        (folder / f"class{label}").mkdir(parents=True)
    for index in range(count):
        target = folder / f"class{index % 3}" / f"{index}.png"
        pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(target)
    return str(folder)


def zsq(monkeypatch, capsys, *arguments):
    """Run the command line; return exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["zsq", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def zsq_json(monkeypatch, capsys, *arguments):
    """Run the command line with --json; return the object it printed."""
    code, out, err = zsq(monkeypatch, capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)
