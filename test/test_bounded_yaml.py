"""YAML from outside is read within bounds, and what is refused is refused in one line."""

import resource
import subprocess
import sys
import textwrap

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_nodes import bounded_yaml
from vla_nodes.bounded_yaml import YamlError, parse

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)


@given(PLAIN)
def test_what_is_within_the_bounds_is_what_pyyaml_reads(value):
    assert parse(yaml.safe_dump(value)) == value


@settings(max_examples=300)
@given(st.text(alphabet="[]{}:,-&*a1 \n'\"|>!%@#?", max_size=60))
def test_any_text_is_read_as_pyyaml_reads_it_or_refused_in_one_line(text):
    try:
        value = parse(text)
    except YamlError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert repr(value) == repr(yaml.load(text, bounded_yaml.LOADER))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "deep"),
        ("{a: " * 100_000, "deep"),
        ("- " * 50_000 + "x", "deep"),
        (BOMB, "more than"),
        ("a: &a [*a]", "stands within"),
        ("a: [1, 2", "line"),
        ("a: b: c", "line 1"),
        ("d: 2020-13-45", "not YAML"),
        ("a: 1" + ":1" * 400_000, "a number of 800001 characters"),
        ("--- a\n--- b\n" * 400_000, "more than one document"),
        ("? [1, 2]\n: x", "not YAML"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("\x00", "not YAML"),
    ],
)
def test_hostile_text_is_refused(text, said):
    with pytest.raises(YamlError, match=said) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_aliases_within_the_bounds_are_read():
    assert parse("a: &a {k: [1, 2]}\nb: *a\nc: [*a, *a]") == {
        "a": {"k": [1, 2]}, "b": {"k": [1, 2]}, "c": [{"k": [1, 2]}] * 2,
    }  # fmt: skip


def test_a_bomb_costs_neither_memory_nor_time(tmp_path):
    """In a process that may take 300 MB, interpreter included, and 5 s."""
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMB)
    code = textwrap.dedent(f"""
        from vla_nodes import bounded_yaml
        for text in (open({str(path)!r}).read(), "[" * 1_000_000):
            try:
                bounded_yaml.parse(text)
            except bounded_yaml.YamlError as error:
                print(error)
    """)
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, preexec_fn=limit, check=True
    )
    assert done.stdout.count("\n") == 2 and "values" in done.stdout and "deep" in done.stdout


def test_a_file_is_named(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("x" * 100)
    with pytest.raises(YamlError, match=f"{path}: more than 50 bytes"):
        bounded_yaml.read(path, max_bytes=50)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(YamlError, match="not UTF-8"):
        bounded_yaml.read(path)
    with pytest.raises(OSError, match="No such file"):
        bounded_yaml.read(tmp_path / "none.yaml")
