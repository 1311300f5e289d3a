"""The code of README.md and docs/ runs, page by page, in order, on a tiny model.

A page finds `model`, `tokenizer` and `dataset` made, and in its directory a model (`MODEL`, `path/of/model`), texts
(`text.txt`), questions (`questions.jsonl`), a compressed checkpoint (`checkpoint`) and, where it does not make one
itself, `out`. What a block writes stays for those behind it, as for a user.
"""

import json
import re
import shlex
import shutil
from itertools import pairwise

import compressing
import pages
import pytest
import tiny
import typer.main
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import bitpress
from bitpress.cli import app

# How a page makes `out`; one that does not is about what has been compressed already.
WRITES_OUT = re.compile(r"""(output_dir=|save_pretrained\(|--output |--output-dir )"?out\b""")
RUN = [page for page in pages.PAGES if any(b.language in ("python", "console") for b in pages.blocks(page))]
# Calls that write or need nothing beyond a page's directory; the others are parsed.
CHEAP = {"convert", "evaluate", "mappings", "oneshot", "plan", "recipes"}

# Wide enough for groups of 128, and for sequences of 512 tokens.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 2048, "vocab_size": 259}


def name(page):
    return page.name


def tokenizer():
    """Of bytes: it knows every text."""
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    known = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    plain = Tokenizer(models.BPE({word: i for i, word in enumerate(known)}, []))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, **special)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The directory that every page starts with."""
    folder = tmp_path_factory.mktemp("docs")
    tiny.llama(**SIZES).save_pretrained(folder / "MODEL")
    tokenizer().save_pretrained(folder / "MODEL")
    shutil.copytree(folder / "MODEL", folder / "path" / "of" / "model")
    texts = compressing.sentences(64)
    (folder / "text.txt").write_text("\n\n".join(texts))
    asked = [{"question": first, "choices": [second, first], "answer": 0} for first, second in pairwise(texts[:4])]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    bitpress.oneshot(folder / "MODEL", recipe=compressing.rtn(group_size=64), output_dir=folder / "checkpoint")
    return folder


@pytest.fixture
def place(source, tmp_path, monkeypatch):
    """A copy of it, as the current directory."""
    folder = tmp_path / "page"
    shutil.copytree(source, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("page", RUN, ids=name)
def test_runs(page, place):
    if not WRITES_OUT.search(page.read_text()):
        shutil.copytree(place / "checkpoint", place / "out")
    names = {
        "__name__": "__main__",
        "model": tiny.llama(**SIZES),
        "tokenizer": tokenizer(),
        "dataset": compressing.sentences(),
    }
    for block in pages.blocks(page):
        if block.language == "python" and "notest" not in block.notes:
            # Lines of a traceback are those of the page.
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)  # noqa: S102
        elif block.language == "console" and "notest" not in block.notes:
            for command in pages.commands(block):
                words = shlex.split(command)[1:]
                if words[0] in CHEAP:
                    result = CliRunner().invoke(app, words, catch_exceptions=False)
                    assert result.exit_code == 0, f"{page.name}: {command}: {result.output}"


@pytest.mark.parametrize("page", pages.PAGES, ids=name)
def test_commands_are_there(page):
    of_blocks = [c for b in pages.blocks(page) if b.language in ("console", "bash") for c in pages.commands(b)]
    for command in of_blocks:
        assert (problem := refused(command)) is None, f"{page.name}: {command}: {problem}"
    for command in pages.mentions(page):
        assert (problem := unknown(command)) is None, f"{page.name}: {command}: {problem}"


def refused(command):
    """Why the command line would not take the call; None if it would. Nothing is run."""
    group = typer.main.get_command(app)
    words = shlex.split(command)[1:]
    if words[0] not in group.commands:
        return unknown(command)
    try:
        group.commands[words[0]].make_context(words[0], words[1:])
    except Exception as error:
        return str(error)
    return None


def unknown(command):
    """The command or the first option that is not there; None if all are. Arguments may be left out in a text."""
    group = typer.main.get_command(app)
    _, word, *words = shlex.split(command.replace("'", ""))
    if word.startswith("-"):
        return None if word in ("--help", "--version", "--install-completion") else word
    if word not in group.commands:
        return f"there is no command {word}"
    options = {"--help", *(o for p in group.commands[word].params for o in (*p.opts, *p.secondary_opts))}
    return next((w for w in words if w.startswith("--") and w.partition("=")[0] not in options), None)


def test_what_is_no_command_is_found():
    assert "nowhere" in refused("bitpress nowhere")
    assert "--nothing" in refused("bitpress plan MODEL --recipe w4a16 --nothing 3")
    assert "model" in refused("bitpress plan --recipe w4a16")
    assert unknown("bitpress plan --nothing") == "--nothing"
    assert unknown("bitpress plan MODEL --recipe w4a16") is None
