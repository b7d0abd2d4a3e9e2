"""scripts/train_gpt_oss.py: one curve whatever the mesh, and the loader behind it."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unittest.mock
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

import transformers

from magi_sink_cp import make_cp_plan
from tests.integrations.transformers_models import available, error, gradients, make_model
from tests.support.scripts import run_main

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
packed_data = importlib.import_module("packed_data")

TEXTS = [f"{n}: " + "the quick brown fox. " * (1 + 7 * n % 40) for n in range(60)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """model/ with a config whose routers have a loss, and data/ with both kinds of files."""
    folder = tmp_path_factory.mktemp("job")
    transformers.GptOssConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=32, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
        vocab_size=257, sliding_window=16, pad_token_id=None, bos_token_id=None, eos_token_id=256,
        output_router_logits=True, router_aux_loss_coef=0.1,
    ).save_pretrained(folder / "model")  # fmt: skip
    (folder / "data").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[2:])
    (folder / "data" / "many.jsonl").write_text(lines + "\n")
    for n in range(2):
        (folder / "data" / f"{n}.txt").write_text(TEXTS[n])
    return folder


# --- The loader ---------------------------------------------------------------------------------


def tokenize(text: str) -> list[int]:
    return [*text.encode(), 256]


def make_stream(folders: Path, index: int = 0, count: int = 1, place=packed_data.Place()):  # noqa: B008
    documents = packed_data.Documents(str(folders / "data"))
    return packed_data.Stream(documents, tokenize, index, count, 3, place)


def test_an_epoch_holds_each_document_once(folders):
    documents = packed_data.Documents(str(folders / "data"))
    assert sorted(documents.text(n) for n in range(len(documents))) == sorted(TEXTS)
    seen = []
    for index in range(4):
        stream = make_stream(folders, index, 4)
        pieces: list[int] = []
        while stream.place.epoch == 0 and stream.place.number < 15:
            pieces += stream.sequence(1)[0]
        seen += bytes(x if x < 256 else 0 for x in pieces).split(b"\0")[:-1]
    assert sorted(text.decode() for text in seen) == sorted(TEXTS)


def test_labels_are_the_next_tokens_also_where_a_document_is_cut(folders):
    stream = make_stream(folders)
    long, parts = make_stream(folders).sequence(900), [stream.sequence(300) for _ in range(3)]
    for k in range(2):
        assert [x for part in parts for x in part[k]] == long[k]
    tokens, labels, offsets = long
    ends = {hi for _, hi in itertools.pairwise(offsets)}
    for n in range(899):
        expected = packed_data.IGNORED if n + 1 in ends else tokens[n + 1]
        assert labels[n] == expected, n


def test_a_stream_goes_on_at_its_place(folders):
    whole = make_stream(folders)
    expected = [whole.sequence(701) for _ in range(40)]  # several epochs
    assert whole.place.epoch >= 1
    stream = make_stream(folders)
    for sequence in expected:
        assert stream.sequence(701) == sequence
        stream = make_stream(folders, place=stream.place)


def test_the_order_is_that_of_one_process(folders):
    def first(workers: int) -> list:
        streams = [make_stream(folders, n, 4) for n in range(4)]
        sequences = packed_data.PackedSequences(
            streams, range(4), 300, 1, 0, [(-1, 0), (15, 0)], None
        )
        loader = packed_data.make_loader(sequences, 4, workers, False)
        assert loader.num_workers == min(workers, 2)
        return list(itertools.islice(loader, 8))

    for ours, theirs in zip(first(3), first(0), strict=True):
        assert (ours.stream, ours.place) == (theirs.stream, theirs.place)
        assert torch.equal(ours.tokens, theirs.tokens)
        assert ours.blueprint.digest == theirs.blueprint.digest


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=60),
    st.sampled_from([1, 2, 4, 6, 8]),
    st.floats(0, 1e5),
)
def test_groups_hold_each_document_once_and_are_even(lengths, cp_size, pairs_per_token):
    groups = packed_data.assign(lengths, cp_size, pairs_per_token)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    assert cp_size % len(groups) == 0
    for weigh in (lambda n: n, lambda n: n * (pairs_per_token + n / 2)):
        loads = [sum(weigh(lengths[n]) for n in group) for group in groups]
        assert max(loads) * len(loads) <= packed_data.UNEVEN * sum(loads) * (1 + 1e-9)


def test_long_documents_get_more_ranks_than_short_ones():
    assert len(packed_data.assign([8000], 4, 1e4)) == 1
    assert len(packed_data.assign([4000, 4000], 4, 1e4)) == 2
    assert len(packed_data.assign([100] * 80, 4, 1e4)) == 4
    # As many tokens, and four times the pairs: even where attention costs little.
    lengths = [4000, *[1000] * 4]
    assert len(packed_data.assign(lengths, 2, 1e5)) == 2
    assert len(packed_data.assign(lengths, 2, 100)) == 1


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.jsonl", '{"other": "x"}\n', "document at byte 0: KeyError"),
        ("a.jsonl", "[1]\n", "document at byte 0: TypeError"),
        ("a.jsonl", "{\n", "document at byte 0: JSONDecodeError"),
        ("a.jsonl", '{"text": 3}\n', "'text' must be a text, got int"),
        ("a.txt", b"\xff\xfe", "document at byte 0: UnicodeDecodeError"),
    ],
)
def test_documents_that_cannot_be_read(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=text):
        packed_data.Documents(str(tmp_path)).text(0)


def test_documents_without_a_token_to_predict(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.txt").write_text("x")
    documents = packed_data.Documents(str(tmp_path))

    def stream(tokens: list[int], place=packed_data.Place()):  # noqa: B008
        return packed_data.Stream(documents, lambda text: tokens, 0, 1, 0, place)

    with pytest.raises(ValueError, match="3 documents of stream 0 of 1 hold no token to predict"):
        stream([1]).sequence(4)
    with pytest.raises(ValueError, match=r"token=5\) is behind the document's 3 tokens"):
        stream([1, 2, 3], packed_data.Place(0, 1, 5)).sequence(4)


def test_files_that_hold_no_text(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("not a document")
    (tmp_path / "a.txt").write_text("a document")
    documents = packed_data.Documents(str(tmp_path))
    assert len(documents) == 1
    before = documents.fingerprint()
    (tmp_path / "a.txt").write_text("another document")
    assert packed_data.Documents(str(tmp_path)).fingerprint() != before
    (tmp_path / "b.jsonl.gz").touch()
    with pytest.raises(ValueError, match=r"b.jsonl.gz is no text"):
        packed_data.Documents(str(tmp_path))


# --- The loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", available())
def test_the_loss_is_transformers_own(name, tmp_path):
    """TokenLoss computes the logits of some rows at a time; also where a model scales them."""
    job = importlib.import_module("train_gpt_oss")
    more = {"logits_scaling": 8.0} if "granite" in name else {}
    if name in ("gpt_oss", "granitemoe_swa", "flint"):
        more["output_router_logits"] = True
    model = make_model(name, **more)
    ids = torch.randint(1, 97, (1, 60), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(60)[None] % 25
    labels = ids.roll(-1).masked_fill(positions.roll(-1) == 0, packed_data.IGNORED)
    outputs = model(
        input_ids=ids, position_ids=positions, labels=ids, shift_labels=labels, use_cache=False
    )
    outputs.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    plan = make_cp_plan(60, cu_seqlens=[0, 25, 50, 60])
    with unittest.mock.patch.object(job, "ROWS_OF_LOGITS", 16):
        loss, balance = job.TokenLoss(model)(ids[0], labels[0], plan)
    total = loss / (labels != packed_data.IGNORED).sum() + balance
    total.backward()
    assert error(total, outputs.loss) < 1e-5
    for key, grad in gradients(model).items():
        assert error(grad, expected[key]) < 1e-5, key
    assert job.pairs_per_token(job.TokenLoss(model), model.config) > 0


# --- The job ------------------------------------------------------------------------------------


def command(ranks: int, *arguments: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = [str(ROOT / "scripts" / "train_gpt_oss.py"), *arguments]
    return [sys.executable, *(launcher if ranks > 1 else []), *script]


def run(ranks: int, *arguments: str) -> None:
    done = subprocess.run(command(ranks, *arguments), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def column(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file)]


@pytest.mark.skipif(
    "INTEGRATIONS" not in os.environ, reason="its five processes take a minute: make integrations"
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="it compares fp32; GPUs compute in bf16")
def test_one_curve_whatever_the_mesh(folders, tmp_path):
    """dp 2, ended by a SIGTERM to every rank and to torchrun, as a scheduler sends it, goes on with
    cp 2 and groups of its own for each batch: as one process.
    """
    options = ["--model", str(folders / "model"), "--data", str(folders / "data")]
    options += ["--seq-len", "256", "--sequences", "2", "--lr", "1e-2", "--warmup", "2"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    process = subprocess.Popen(
        command(2, *options, "--cp", "1", "--steps", "100000", "--workers", "1", "--out",
                str(parted)),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip
    while not (parted / "metrics.csv").exists() or len(column(parted, "loss")) < 2:
        assert process.poll() is None, "it ended before it was interrupted"
        time.sleep(0.05)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    for target in (*ranks, process):
        target.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "stopped: saved; go on with --resume" in out
    done = len(column(parted, "loss"))
    steps = ["--steps", str(done + 4), "--save-model", "--workers", "0"]
    run(2, "--resume", str(parted), *steps, "--cp", "2", "--dynamic-cp")
    run(1, *options, *steps, "--out", str(whole))
    for name in ("loss", "grad_norm"):
        expected = column(whole, name)
        assert column(parted, name) == pytest.approx(expected, rel=2e-4)
        assert expected[0] != pytest.approx(expected[-1], rel=1e-2), "nothing was learned"
    sizes = column(parted, "mean_cp_size")
    assert set(sizes[:done]) == {1.0}
    assert 1 < sum(sizes[done:]) / 4 < 2, "all sequences were parted, or none"
    assert (parted / "training.png").stat().st_size > 10_000
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
        for folder in (whole, parted)
    ]
    assert "magi_sink" not in (parted / "model" / "config.json").read_text()
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max() + 1e-3


WRONG = {
    "--seq-len 0": "--seq-len must be at least 1",
    "--lr nan": "--lr must be a finite number > 0, got nan",
    "--workers -1": "--workers must be at least 0",
    "--model BINARY": r"has weights as \*.bin",
    "--model SCALED": "has logit_scale in its config",
    "--model CAPPED": "has final_logit_softcapping in its config",
    "--model UNKNOWN": "must hold a config.json of transformers: .*nobody's",
    "--model WEIGHTS": "must hold tokenizer.json",
    "--cp 3": "--cp must divide the number of ranks, 2, got 3",
    "--cp 1 --sequences 3": "must be a multiple of the 2 cp groups",
    "--model nowhere": "--model nowhere must hold a config.json",
    "--model GPTQ": "is quantized as 'gptq'",
    "--resume nowhere": "--resume nowhere holds no settings.json",
    "--data nowhere": "--data: .*nowhere does not exist",
    "--data ONE": "must hold a document for each of the 4 sequences of a step, got 1",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_the_job_refuses_before_it_trains(tmp_path, wrong, folders, monkeypatch, capsys):
    job = importlib.import_module("train_gpt_oss")
    (tmp_path / "ONE").write_text("one document")
    for name, config in {
        "GPTQ": {"quantization_config": {"quant_method": "gptq"}},
        "SCALED": {"logit_scale": 0.1},
        "CAPPED": {"model_type": "gemma2"},
        "UNKNOWN": {"model_type": "nobody's"},
        "BINARY": {},
        "WEIGHTS": {},
    }.items():
        (tmp_path / name).mkdir()
        config = {"model_type": "gpt_oss"} | config
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "BINARY" / "pytorch_model.bin").touch()
    (tmp_path / "WEIGHTS" / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "make_model", None)  # nothing may be computed
    if "--cp" in wrong:
        monkeypatch.setattr(os, "environ", {**os.environ, "WORLD_SIZE": "2"})
    options = ["--model", str(folders / "model"), "--data", str(folders / "data"), "--out", "run"]
    assert run_main(job, monkeypatch, *options, *wrong.split()) == 2
    message = capsys.readouterr().err
    assert re.search(WRONG[wrong], message), message
    assert "Traceback" not in message


def main(monkeypatch, *arguments: str) -> int:
    """The job in this process, as without torchrun."""
    job = importlib.import_module("train_gpt_oss")
    return run_main(job, monkeypatch, *arguments, "--workers", "0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the model is smaller than GPU kernels take")
def test_changed_data_and_a_line_that_cannot_be_read(folders, tmp_path, monkeypatch, capsys):
    """A resume notices the first; the second ends the run with one line, saved."""
    data = tmp_path / "data"
    shutil.copytree(folders / "data", data)
    monkeypatch.chdir(tmp_path)
    options = ["--model", str(folders / "model"), "--data", "data", "--seq-len", "64"]
    assert main(monkeypatch, *options, "--sequences", "1", "--steps", "2") == 0
    (folder,) = tmp_path.glob("runs/*")
    assert len(column(folder, "loss")) == 2
    (data / "many.jsonl").write_text("{}\n" * 3)
    resume = ["--resume", str(folder), "--steps", "1000"]
    assert main(monkeypatch, *resume) == 2
    assert "have changed" in capsys.readouterr().err
    before = (folder / "checkpoint").stat().st_ino
    assert main(monkeypatch, *resume, "--data", "data") == 1
    errors = capsys.readouterr().err
    assert re.search(r"error: .*many.jsonl, document at byte .*KeyError", errors), errors
    assert (folder / "checkpoint").stat().st_ino != before, "it was not saved"
