"""Models as folders that others load: our form by a process with only torch and safetensors, HF's by transformers."""
import json
import os
import random
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tiktoken
import torch

from data.tokenizers import from_ranks
from model.config import ModelConfig, Softcap
from model.gpt import GPT
from scripts import export as exporting
from scripts import export_model
from scripts.export import export, hf_vocabulary, main, resolved, write_ours
from scripts.sample import load_run
from tests.conftest import ROOT, the_run, train_here
from tests.test_tokenizers import openai_files  # noqa: F401

TEXT = "Straße,\tI'm  42 – def f(x):\n    return x\n\n🙂 naïve"

LOADS = """
import json, sys
import torch
from model import load
logits = load(sys.argv[1])(torch.tensor(json.loads(sys.argv[2])))
ours = {"optim", "harness", "scripts", "train", "data"} | {name for name in sys.modules if name.startswith("model.")}
assert not ours & set(sys.modules), ours & set(sys.modules)
assert not {"pydantic", "yaml", "transformers", "tiktoken"} & set(sys.modules)
torch.save(logits, "logits.pt")
"""


def random_model(config: ModelConfig, seq_len: int = 16) -> GPT:
    """Every weight drawn, so that no part of the model is without effect."""
    model, generator = GPT(config, seq_len), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if name.endswith("gain") else 0.0, 0.4, generator=generator)
    return model


def some_tokens(vocab_size: int = 61, t: int = 16) -> torch.Tensor:
    return torch.randint(vocab_size, (2, t), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run of the tiny configuration, and one of GPT-2's form; both short."""
    from tests.conftest import TINY
    runs = {}
    for form, more in (("ours", ()), ("hf", ("model.tied=true",))):
        folder = tmp_path_factory.mktemp(form)
        text = TINY.format(data=corpus, runs=folder / "runs")
        if form == "hf":
            start, rest = text.split("model:\n")
            text = start + "model: {vocab_size: 257, padded_vocab_size: 260, layers: 2, heads: 2, width: 32}\ndata:" + \
                rest.split("data:")[1]
        (folder / "tiny.yaml").write_text(text)
        assert train_here("--config", folder / "tiny.yaml", "steps=4", "average=0.5",
                          f"target_on={'average' if form == 'ours' else 'raw'}", "target_val_loss=1") == 0
        runs[form] = the_run(folder / "tiny.yaml")
    return runs


# ---- our form

OPTIONS = [
    {"positions": "rotary"}, {"positions": "rotary", "rotary": "half", "rotary_base": 50.0},
    {"norm": "rmsnorm"}, {"norm_gain": False, "biases": False}, {"norm_eps": 0.3}, {"embed_norm": True},
    {"qk_norm": "before_rotary", "positions": "rotary"}, {"qk_norm": "after_rotary"}, {"attn_scale": 0.9},
    {"attn_branch_scale": 0.3}, {"value_residual": "fixed"}, {"value_residual": "learned"}, {"embed_shortcut": True},
    {"unet": True}, {"activation": "gelu"}, {"activation": "relu2"}, {"biases": False}, {"tied": False},
    {"tied": False, "biases": False, "padded_vocab_size": 64}, {"head_dim": 4}, {"mlp_width": 24}, {"window": 3},
    {"softcap": Softcap(form="tanh", cap=2.0)}, {"softcap": Softcap(form="isru", cap=2.0)},
    {"softcap": Softcap(form="sigmoid", cap=3.0, scale=1.5, shift=0.7, before_cast=True)},
]
BASE = {"vocab_size": 61, "layers": 4, "heads": 2, "width": 16}


@torch.no_grad()
def logits_of_both(config, folder, change):
    model = random_model(ModelConfig(**BASE | change))
    write_ours(replace(config, seq_len=16, model=model.config), model, folder)
    return export_model.load(folder)(some_tokens()), model.logits(some_tokens())


@pytest.mark.parametrize("change", OPTIONS, ids=str)
def test_the_exported_file_is_the_same_function_with_every_option(tmp_path, tiny_config, change):
    theirs, ours = logits_of_both(tiny_config, tmp_path, change)
    torch.testing.assert_close(theirs, ours, rtol=2e-5, atol=2e-5)
    with torch.no_grad():
        plain = random_model(ModelConfig(**BASE)).logits(some_tokens())
    assert (plain - ours).abs().max() > 1e-3                            # the option matters


@pytest.mark.parametrize("seed", range(20))
def test_the_exported_file_is_the_same_function_with_options_at_random(tmp_path, tiny_config, seed):
    change = {}
    for option in random.Random(seed).sample(OPTIONS, 8):
        change |= option
    theirs, ours = logits_of_both(tiny_config, tmp_path, change)
    torch.testing.assert_close(theirs, ours, rtol=2e-5, atol=2e-5)


@pytest.fixture(scope="module")
def tiny_config(trained):
    return load_run(trained["ours"])[0]


def test_every_key_of_a_model_is_exported_or_only_of_training(tiny_config):
    exported = {f.name for f in fields(export_model.Config)} - {"seq_len", "tokenizer", "end_of_text"}
    assert exported.isdisjoint(exporting.TRAINING_ONLY)
    assert exported | set(exporting.TRAINING_ONLY) == {f.name for f in fields(ModelConfig)}
    assert list(resolved(tiny_config, GPT(tiny_config.model, 32))) == [f.name for f in fields(export_model.Config)]


def test_it_loads_where_there_is_only_torch_and_safetensors(trained, tmp_path):
    """In an empty folder, isolated from this project's path, with the exported folder alone beside the script."""
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    assert export(trained["ours"], out) == []
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.py", "model.safetensors"]
    tokens = some_tokens(64, 32)
    code = f"import sys; sys.path.insert(0, {str(out)!r})\n{LOADS}"
    done = subprocess.run([sys.executable, "-I", "-c", code, str(out), json.dumps(tokens.tolist())], cwd=empty,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    config, model = load_run(trained["ours"])
    with torch.no_grad():
        expected = model.logits(tokens)
    assert config.target_on == "average" and expected.std() > 1e-3
    torch.testing.assert_close(torch.load(empty / "logits.pt"), expected, rtol=1e-5, atol=1e-5)


def test_the_file_reads_in_one_sitting_and_needs_two_packages():
    source = Path(export_model.__file__).read_text()
    assert source.count("\n") < 250
    imports = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imports == {"json", "dataclasses", "pathlib", "torch", "safetensors"}


@torch.no_grad()
def test_generated_tokens_are_the_likeliest_after_the_last_row(tiny_config, tmp_path):
    ours = random_model(ModelConfig(**BASE))
    write_ours(replace(tiny_config, seq_len=16, model=ours.config), ours, tmp_path)
    tokens = export_model.load(tmp_path).generate(some_tokens(t=14), 5, temperature=0)
    for place in range(14, 19):
        assert torch.equal(tokens[:, place], ours.logits(tokens[:, max(0, place - 16):place])[:, -1].argmax(-1))


def test_half_precision_is_close(trained, tmp_path):
    export(trained["ours"], tmp_path / "out")
    tokens = some_tokens(64, 32)
    full, half = (export_model.load(tmp_path / "out").to(dtype)(tokens) for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.float32 and 0 < (half - full).abs().max() < 0.05 * full.abs().max()


# ---- the card

def test_the_card_says_which_weights_they_are_and_what_they_reached(trained, tmp_path):
    summaries = {form: json.loads((run / "summary.json").read_text()) for form, run in trained.items()}
    for form, key, weights in (("ours", "val_loss_avg", "average"), ("hf", "val_loss", "last")):
        export(trained[form], tmp_path / form, form)
        card = (tmp_path / form / "README.md").read_text()
        assert f"| weights | {weights}, float32, after step 4 of 4 |" in card
        assert f"| validation loss | {summaries[form][key]:.4f} nats per token" in card
        assert (trained[form] / "config.yaml").read_text() in card and trained[form].name in card
    assert f"{summaries['ours']['val_loss_avg']:.4f}" != f"{summaries['ours']['val_loss']:.4f}"
    assert card.startswith("---\nlibrary_name: transformers\n")


def test_the_loss_of_a_run_that_was_cut_off_is_its_log_s_or_none(tmp_path):
    lines = [{"step": 4, "train_s": 1.0, "val_loss": 2.5}, {"step": 5, "train_s": 1.0, "train_loss": 2.4}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert exporting.loss_of(tmp_path, 4, False) == "2.5000 nats per token"
    for step, averaged in ((5, False), (4, True)):
        assert exporting.loss_of(tmp_path, step, averaged) == "not measured after this step"
    (tmp_path / "summary.json").write_text(json.dumps({"status": "finished", "steps": 8, "val_loss": 2.0}))
    assert exporting.loss_of(tmp_path, 4, False) == "2.5000 nats per token"
    assert exporting.loss_of(tmp_path, 8, False) == "2.0000 nats per token"


# ---- Hugging Face's form

@torch.no_grad()
def test_transformers_loads_the_other_form_with_its_tokenizer(trained, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: it is the judge here")
    assert export(trained["hf"], tmp_path / "out", "hf") == []
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = some_tokens(257, 32)
    torch.testing.assert_close(theirs(tokens).logits, load_run(trained["hf"])[1].logits(tokens), rtol=1e-5, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXT)["input_ids"] == list(TEXT.encode()) and tokenizer.decode(list(TEXT.encode())) == TEXT
    assert tokenizer.eos_token_id == theirs.config.eos_token_id == 256


def test_merges_are_read_off_the_ranks(tmp_path, openai_files):  # noqa: F811
    """OpenAI's two files come back from tiktoken's ranks, line by line."""
    encoding = from_ranks(openai_files)
    vocabulary, merges = hf_vocabulary(encoding)
    assert vocabulary == json.loads((openai_files / "encoder.json").read_text(encoding="utf-8"))
    assert merges == (openai_files / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]


def test_a_vocabulary_of_merges_encodes_in_transformers_as_in_tiktoken(tmp_path, monkeypatch, trained):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: it is the judge here")
    from tiktoken_ext.openai_public import r50k_pat_str
    merged = [b" x", b"re", b"tu", b"rn", b"turn", b"return", b"\n\n", b"\xc3\x9f", "–".encode()[:2], "–".encode()]
    ranks = {bytes([byte]): byte for byte in range(246)} | {bytes([byte]): byte + 10 for byte in range(246, 256)}
    ranks |= {token: 246 + i for i, token in enumerate(merged)}
    few = tiktoken.Encoding("few", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 266})
    config, model = load_run(trained["hf"])
    wide = replace(config, model=replace(config.model, vocab_size=280, padded_vocab_size=None))
    monkeypatch.setattr(exporting, "by_name", lambda name: few)
    assert exporting.write_hf(wide, random_model(wide.model, 32), tmp_path) == []
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 256       # of data.tokenizer: bytes
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = few.encode_ordinary(TEXT)
    assert theirs(TEXT)["input_ids"] == ids and len(ids) < len(TEXT.encode())
    assert exporting.write_hf(config, model, tmp_path) == ["no tokenizer files: few has 267 ids, this model 257"]


def test_a_missing_vocabulary_is_said_and_the_weights_written(trained, tmp_path, monkeypatch, capsys):
    def missing(name):
        raise exporting.VocabularyError("GPT-2's vocabulary is missing")
    monkeypatch.setattr(exporting, "by_name", missing)
    monkeypatch.setattr(sys, "argv", ["export", str(trained["hf"]), "--out", str(tmp_path / "out"), "--form", "hf"])
    assert main() == 0
    assert "note: no tokenizer files: GPT-2's vocabulary is missing\n" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "no tokenizer files" in (tmp_path / "out" / "README.md").read_text()


# ---- nothing half-written

def test_an_existing_target_is_refused_unless_empty(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    export(trained["ours"], tmp_path / "empty")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "empty").iterdir()}
    for target in (tmp_path / "empty", tmp_path / "empty" / "model.py"):
        with pytest.raises(ValueError, match="exists and is not an empty folder; remove it or choose another"):
            export(trained["ours"], target)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "empty").iterdir()} == before


@pytest.mark.parametrize("form", ["ours", "hf"])
def test_a_model_that_reads_back_as_another_is_not_written(trained, tmp_path, monkeypatch, form):
    monkeypatch.setattr(export_model, "capped", lambda z, softcap: 1.01 * z)
    true_to_hf = exporting.to_hf

    def wrong(model, folder, end_of_text):
        model.pos.weight.data[3].neg_()
        true_to_hf(model, folder, end_of_text)
        model.pos.weight.data[3].neg_()
    monkeypatch.setattr(exporting, "to_hf", wrong)
    with pytest.raises(ValueError, match="logits differ from the run's by up to .*; nothing was written"):
        export(trained[form], tmp_path / "out", form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments, message", [
    (["{none}", "--out", "{out}"], "none"),
    (["{ours}", "--out", "{out}", "--form", "hf"], "only GPT-2's form can be written"),
    (["{ours}", "--out", "{ours}"], "exists and is not an empty folder"),
    (["{ours}", "--out", "{file}/out"], "file"),
])
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(trained, tmp_path, monkeypatch, capsys, arguments,
                                                               message):
    (tmp_path / "file").write_text("")
    names = {"ours": trained["ours"], "none": tmp_path / "none", "out": tmp_path / "out", "file": tmp_path / "file"}
    monkeypatch.setattr(sys, "argv", ["export", *(argument.format(**names) for argument in arguments)])
    assert main() == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err and "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_help_is_quick_and_loads_nothing_slow():
    code = ("import runpy, sys; sys.argv = ['export', '--help']\n"
            "try: runpy.run_module('scripts.export', run_name='__main__')\n"
            "except SystemExit: pass\n"
            "print('loaded:', *sorted({'transformers', 'triton', 'scipy', 'datasets', 'tiktoken'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("usage:") and done.stdout.endswith("loaded:\n"), done.stdout + done.stderr
