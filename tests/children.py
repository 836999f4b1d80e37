"""Processes of their own, to be killed: forked from one that has made the imports, so that each need not make them."""

from __future__ import annotations

import multiprocessing
import os
from contextlib import suppress

import torch

import veneer.config

forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(
    ["transformers.models.llama.modeling_llama", "veneer.base.load", "veneer.training.loop", "veneer.formats.peft"]
)


def start(target, *arguments):
    """A process that runs `target(say, *arguments)`, and an iterator over what it says until it ends."""
    reader, writer = forked.Pipe(duplex=False)
    process = forked.Process(target=_run, args=(dict(os.environ), writer, target, arguments))
    process.start()
    writer.close()
    return process, _said(reader)


def training(say, config, how):
    """A run, or the rest of it where `how` is "resume"; says (type, step) of each record."""
    config, resume = veneer.config.TrainConfig.load(config), how == "resume"
    veneer.train(config, resume=resume, observe=lambda r: say((r["type"], r.get("step", r.get("steps")))))


def _run(environment, writer, target, arguments):
    os.environ.clear()
    os.environ.update(environment)  # the process that it is forked from has an older one
    torch.set_num_threads(1)
    target(writer.send, *arguments)


def _said(reader):
    with suppress(EOFError):
        while True:
            yield reader.recv()
