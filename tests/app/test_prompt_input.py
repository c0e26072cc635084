"""What goes into and comes out of the commands: lines, bytes, JSON, closed pipes, conversations."""

import io
import json
import math
import os
import sys

import pytest
import tiny_models as tiny
import torch

from mod_fused.app import prompt_input, terminal
from mod_fused.app.prompt_input import read_conversations, read_prompts
from mod_fused.cli import main


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("ref", 0), ("pol", 1)):
        tiny.llama(seed).save_pretrained(root / name)
        tiny.tokenizer().save_pretrained(root / name)
    return ["--reference", str(root / "ref"), "--policy", str(root / "pol")]


def give(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


def generated(capsys, *argv: str) -> list[dict]:
    assert main(["generate", "--json", "--max-new-tokens", "3", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]


# ---- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "prompts"),
    [
        (b"a b\nc\n", ["a b", "c"]),
        (b"a b\r\nc\r\n", ["a b", "c"]),
        (b"a b\r\nc\nd", ["a b", "c", "d"]),
        (b"\xef\xbb\xbfa b\r\nc", ["a b", "c"]),
        (b"a\n\n \t\r\n\r\nc\n", ["a", "c"]),
        (b" a \n", [" a "]),
        (b"a\rb\n", ["a\rb"]),
        ("é ü 漢\n".encode(), ["é ü 漢"]),
        *(
            (f"a{separator}b\n".encode(), [f"a{separator}b"])
            for separator in "\v\f\x1c\x1d\x1e\x85\u2028\u2029"
        ),
        (b"", []),
        (b"\xef\xbb\xbf", []),
        ("a\ufeffb\n".encode(), ["a\ufeffb"]),
    ],
)
def test_lines_end_in_lf_or_crlf_and_nowhere_else(data, prompts, tmp_path, capsys, monkeypatch):
    assert read_prompts(data, "x") == prompts
    give(monkeypatch, data)  # whatever the encoding of standard input
    assert read_prompts(prompt_input.standard_input(), "x") == prompts


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"fox\nfo\xff\n", "line 2 of {} is not valid UTF-8"),
        (b"\n\n\xed\xa0\x80\n", "line 3 of {} is not valid UTF-8"),  # half of a surrogate pair
        ("fox\n".encode("utf-16"), "line 1 of {} is not valid UTF-8"),
        ("fox\n".encode("utf-16-le"), "line 1 of {} holds a NUL byte"),
        (b"fox\nf\0x", "line 2 of {} holds a NUL byte"),
    ],
)
def test_a_line_that_is_no_text_is_named(data, said, folders, tmp_path, capsys, monkeypatch):
    give(monkeypatch, data)
    assert main(["generate", *folders]) == 2
    assert said.format("standard input") in capsys.readouterr().err
    (tmp_path / "p.txt").write_bytes(data)
    files = ["--csv", str(tmp_path / "s.csv"), "--picture", str(tmp_path / "s.png")]
    assert main(["sweep", *folders, "--prompt-file", str(tmp_path / "p.txt"), *files]) == 2
    err = capsys.readouterr().err
    assert said.format(tmp_path / "p.txt") in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_prompt_file_that_is_none_is_one_line(name, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *folders, "--prompt-file", name]) == 2
    err = capsys.readouterr().err
    assert name in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_argument_is_utf_8_in_any_locale(folders, capsys):
    hidden = b"fox \xc3\xa9".decode("ascii", "surrogateescape")  # as in an ASCII locale
    (record,) = generated(capsys, *folders, "--prompt", hidden)
    assert record["prompt"] == "fox é"
    for prompt in (os.fsdecode(b"fox \xff"), "fox \ud800"):
        assert main(["generate", *folders, "--prompt", prompt]) == 2
        assert capsys.readouterr().err == "mod-fused: --prompt is not valid UTF-8\n"


def test_without_standard_input_a_prompt_is_asked_for(folders, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", *folders]) == 2
    assert "no prompt: give --prompt" in capsys.readouterr().err


# ---- output --------------------------------------------------------------------------------------


def test_numbers_that_json_does_not_know_are_null(folders, tmp_path, capsys):
    # Whatever the op makes of it: infinite and undefined numbers are written as null.
    from mod_fused.app.generate import _finite

    values = {"a": [1.5, math.inf, [-math.inf, math.nan]], "b": "Infinity", "c": 2, "d": None}
    assert _finite(values) == {"a": [1.5, None, [None, None]], "b": "Infinity", "c": 2, "d": None}

    # A policy of weight 0 that finds every token of the reference impossible.
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    for name, dead in (("ref", slice(0, 4)), ("pol", slice(4, None))):
        model = PhiForCausalLM(PhiConfig(vocab_size=tiny.V, num_attention_heads=2, **sizes))
        with torch.no_grad():
            model.lm_head.bias[dead] = -math.inf
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    own = ["--reference", str(tmp_path / "ref"), "--policy", str(tmp_path / "pol")]
    (record,) = generated(capsys, *own, "--prompt", "fox", "--weights", "0")
    assert [row[1] for row in record["model_logprobs"]] == [None] * 3
    assert all(isinstance(x, float) for x in record["logprobs"])


def test_output_in_an_encoding_that_lacks_a_character_goes_on(folders, capsys, monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    argv = ["generate", *folders, "--max-new-tokens", "2", "--prompt", "fox é", "--prompt", "dog"]
    assert main(argv) == 0
    assert out.getvalue().startswith(b"fox \\xe9")


@pytest.mark.parametrize("extra", [["--json"], []])
def test_a_closed_pipe_ends_quietly(extra, folders, capfd, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        argv = ["generate", *folders, "--max-new-tokens", "2", "--prompt", "fox"]
        assert main([*argv, "--prompt", "dog", *extra]) == 141
        monkeypatch.undo()
    assert "pipe" not in capfd.readouterr().err.lower()


def test_a_note_about_tokenizers_is_one_line_on_stderr(folders, tmp_path, capsys):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tiny.llama(1, tiny.V + 1).save_pretrained(tmp_path / "pol")
    tokenizer.save_pretrained(tmp_path / "pol")
    argv = [*folders[:2], "--policy", str(tmp_path / "pol"), "--prompt", "fox", "--json"]
    assert main(["generate", "--max-new-tokens", "2", *argv]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("mod-fused: only the ") and "'[PAD]'" in err and err.count("\n") == 1


def test_long_work_says_what_it_does_and_short_work_nothing(capsys):
    with terminal.working("counting"):
        pass
    assert capsys.readouterr().err == ""
    with terminal.working("counting", patience=0.0):
        while not (err := capsys.readouterr().err):
            pass
    assert err == "counting ...\n"


@pytest.mark.parametrize("argv", [["--best-of", "100000000"], ["--max-new-tokens", "10000000000"]])
def test_what_cannot_fit_is_refused_with_the_memory_it_would_take(argv, capsys):
    score = ["--score", "helpful", "--best-of", "2"]
    assert main(["generate", "--prompt", "How do I bake bread?", *score, *argv]) == 2
    out, err = capsys.readouterr()
    assert "takes at least" in err and "iB of memory" in err and err.count("\n") == 1


# ---- conversations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("hello", "line 2 of x is not JSON"),
        ("[1]", "line 2 of x must be a list"),
        ("[]", "line 2 of x must be a list"),
        ('{"role": "user", "content": "a"}', "line 2 of x must be a list"),
        ('[{"role": "user"}]', "line 2 of x must be a list"),
        ('[{"role": "user", "content": 3}]', "line 2 of x must be a list"),
        ('[{"role": "user", "content": "\\ud800"}]', "line 2 of x holds half of a surrogate"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(line, said):
    one = '[{"role": "user", "content": "a"}]'
    with pytest.raises(ValueError, match=said):
        read_conversations(f"{one}\n{line}\n".encode(), "x")


# Each model its own: the second one calls a system message a user's.
TEMPLATES = [
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}then{% endif %}",
    "{% for m in messages %}user {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}it is{% endif %}",
]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    root = tmp_path_factory.mktemp("chats")
    vocab = {**tiny.VOCAB, "user": tiny.V, "system": tiny.V + 1}
    for name, seed, template in zip(("ref", "pol"), (0, 1), TEMPLATES, strict=True):
        tiny.llama(seed, tiny.V + 2, eos=None).save_pretrained(root / name)
        tokenizer = tiny.tokenizer(vocab)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(root / name)
    return ["--reference", str(root / "ref"), "--policy", str(root / "pol")]


@pytest.mark.parametrize("greedy_corner", [0, 1])
def test_a_conversation_is_rendered_by_each_models_own_template(
    greedy_corner, chats, tmp_path, capsys, monkeypatch
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = chats[1 + 2 * greedy_corner]
    model, tokenizer = (
        kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    messages = [{"role": "system", "content": "it is"}, {"role": "user", "content": "fox ran"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=3, pad_token_id=0)
    expected = tokens[0, inputs["input_ids"].shape[1] :].tolist()

    corner = [*chats, "--greedy", "--weights", str(greedy_corner)]
    chat = ["--chat", "--system", "it is"]
    (record,) = generated(capsys, *corner, *chat, "--prompt", "fox ran")
    assert record["tokens"] == expected and record["messages"] == messages
    give(monkeypatch, b"\xef\xbb\xbffox ran\r\n")
    assert generated(capsys, *corner, *chat) == [record]
    give(monkeypatch, json.dumps(messages).encode())
    assert generated(capsys, *corner, "--messages", "-") == [record]
    lines = [json.dumps({"messages": messages[1:]}), json.dumps(messages[1:])]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    conversations = ["--messages", str(tmp_path / "m.jsonl")]
    records = generated(capsys, *corner, *conversations, "--system", "it is")
    assert [r["tokens"] for r in records] == [expected] * 2
    (other,) = generated(capsys, *corner, "--chat", "--prompt", "fox ran")
    assert other["messages"] == messages[1:] and other["logprobs"] != record["logprobs"]


def test_conversations_are_answered_one_below_the_other_and_swept(
    chats, tmp_path, capsys, monkeypatch
):
    argv = ["generate", *chats, "--chat", "--max-new-tokens", "2", "--prompt", "fox"]
    assert main([*argv, "--prompt", "dog"]) == 0
    assert capsys.readouterr().out.startswith("fox\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("fox\ndog\n")
    (tmp_path / "seen.py").write_text("def prompt(prompt, response):\n    return len(prompt)\n")
    sweep = ["sweep", *chats, "--points", "2", "--prompt-file", "p.txt", "--max-new-tokens", "2"]
    assert main([*sweep, "--chat", "--system", "it is", "--reward", "seen:prompt"]) == 0
    header, line = (tmp_path / "mod_fused_sweep.csv").read_text().splitlines()
    assert float(line.split(",")[header.split(",").index("reward_policy_1")]) == 3.0


def test_a_model_without_a_chat_template_is_named(folders, capsys):
    assert main(["generate", *folders, "--chat", "--prompt", "fox"]) == 2
    err = capsys.readouterr().err
    assert (
        "the reference's tokenizer cannot render the conversation: Cannot use chat" in err
        and err.count("\n") == 1
    )


def test_a_system_message_is_not_put_before_another(chats, tmp_path, capsys):
    lines = ['[{"role": "user", "content": "a"}]', '[{"role": "system", "content": "a"}]']
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    argv = ["generate", *chats, "--messages", str(tmp_path / "m.jsonl"), "--system", "x"]
    assert main(argv) == 2
    assert "conversation 2 has a system message already" in capsys.readouterr().err


def test_conversations_are_lists_of_messages_or_objects_with_them():
    messages = [{"role": "system", "content": "é"}, {"role": "user", "content": "a\u2028b"}]
    lines = [json.dumps(messages), "", json.dumps({"id": 3, "messages": messages})]
    data = "\r\n".join(lines).encode()
    assert read_conversations(data, "x") == [messages, messages]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["generate", "--chat", "--prompt", "x"], "go with own models"),
        (["generate", "--messages", "x"], "go with own models"),
        (["sweep", "--system", "x"], "go with own models"),
        (["generate", "OWN", "--system", "x", "--prompt", "x"], "--system goes with --chat"),
        (["generate", "OWN", "--messages", "x", "--chat"], "leave out --prompt and --chat"),
        (["generate", "OWN", "--messages", "x", "--prompt", "x"], "leave out --prompt"),
        (["generate", "OWN", "--messages", "missing"], "missing"),
        (["generate", "OWN", "--messages", "empty"], "empty holds no conversation"),
        (["sweep", "OWN", "--chat"], "--prompt-file"),
    ],
)
def test_options_of_conversations_that_do_not_fit_are_refused(
    argv, said, folders, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    assert main([y for x in argv for y in (folders if x == "OWN" else [x])]) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1


def test_a_folder_with_another_kind_of_model_is_one_line(folders, tmp_path, capsys):
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertLMHeadModel(BertConfig(vocab_size=300, hidden_size=16, **sizes)).save_pretrained(tmp_path)
    reference = str(folders[1])
    arguments = ["--reference", reference, "--policy", str(tmp_path), "--prompt", "hi"]
    assert main(["generate", *arguments]) == 2
    err = capsys.readouterr().err
    assert "BertLMHeadModel whose config has is_decoder=False" in err and err.count("\n") == 1
