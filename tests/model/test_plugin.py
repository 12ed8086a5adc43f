"""Position embeddings and joins of a user's own: what a file may hold, who runs it, and what is checked."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers.plugins import EVERYTHING, EXAMPLE, written

from lape_ray.cli import parse
from lape_ray.config import (
    NAMES,
    ModelConfig,
    TrainConfig,
    config_hash,
    dump,
    from_dict,
    replace_fields,
    to_dict,
)
from lape_ray.inference.official import not_official
from lape_ray.model import build_model
from lape_ray.model.plugin import load
from lape_ray.recipes import command_line, recipe
from lape_ray.report.position import views
from lape_ray.search.cells import build_space, positions
from lape_ray.search.space import parse_axes
from lape_ray.training.architecture import timm_network
from lape_ray.training.checkpoint import differences
from lape_ray.values.plugin import TRUST, Plugin, TrustedPlugin, trusted

FAMILIES: dict[str, dict[str, Any]] = {
    "deit_tiny": {"depth": 2, "patch_size": 8, "pool": "gap"},
    "deit3_small": {"depth": 2, "patch_size": 8, "pool": "gap"},
    "cct_7_3x1": {"depth": 2},
    "t2t_vit_7": {"depth": 2, "pool": "gap"},
    "ceit_tiny": {"depth": 2},
    "swin_tiny": {"depths": (2, 1, 1, 1), "patch_size": 2, "window_size": 4},
}
QUICK = ("deit_tiny", "ceit_tiny", "swin_tiny")
SMALL: dict[str, Any] = {"image_size": 32, "embed_dim": 32, "num_heads": 2, "num_classes": 7}
CELLS: list[dict[str, str]] = [
    {"position": "ramp", "join": "late"},
    {"position": "normal", "join": "lape", "bias": "constant", "bias_join": "scaled"},
    {"position": "pointwise", "bias": "keyed", "rotary": "slow"},
    {"position": "learnable", "join": "late", "bias": "alibi2d", "bias_join": "scaled", "rotary": "slow"},
]


def model(plugin: Plugin | None, **values: Any) -> ModelConfig:
    return ModelConfig(
        **{"variant": "deit_tiny", **SMALL, "depth": 2, "patch_size": 8, "plugin": plugin, **values}
    )


JOIN = """\
from torch import zeros
from lape_ray.model.position import LayerPosition
from lape_ray.model.position.join import Join


class Mine(Join):
    def forward(self, w_TND):
        {}


JOINS = {{"mine": Mine}}
"""
NOTHING = JOIN.format("return [LayerPosition()] * self.depth")

# --- the file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", r"mine\.py, line 1: '\(' was never closed: 'x = \('"),
        ("x = 1", r"mine\.py adds nothing: it needs a dict such as JOINS = "),
        ("JOINS = {}", "adds nothing"),
        ("\nJOINS = make()", r"line 2: JOINS must be a dict whose names are written out"),
        ("JOINS = {\n 'a': A,\n name: B}", "line 3: JOINS must be a dict whose names"),
        ("JOINS = {'a b': A}", "line 1: JOINS must be a dict whose names"),
        ("BIASES = {'a': A}\nCONTENT_BIASES = {'a': B}", "line 2: 'a' is there twice"),
        ("JOINS = {'a': A}\n# s3://ann:hidden@host/x", r"line 2: '# s3://host/x' seems to hold a password"),
        ("JOINS = {'a': A}" + 200_000 * " ", "more than 200,000 characters"),
        ("JOINS = {'a': " + 300 * "(" + "A" + 300 * ")" + "}", "too many nested parentheses|no Python"),
    ],
)
def test_what_is_no_plugin_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        written(tmp_path, text)
    assert "hidden" not in str(refusal.value)


def test_a_name_that_is_there_already_is_refused(tmp_path: Path) -> None:
    plugin = written(tmp_path, "\nABSOLUTES = {'peg': 1}")
    with pytest.raises(
        ValueError, match=r"mine\.py, line 2: position=peg is there already; choose another name"
    ):
        ModelConfig(plugin=plugin)


def test_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"nowhere\.py cannot be read: No such file.* give the path of a Python file"
    ):
        TrustedPlugin.read("nowhere.py")
    with pytest.raises(ValueError, match=r"there is no module nowhere\.at_all with its source here"):
        TrustedPlugin.read("nowhere.at_all")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('HF_TOKEN = "hidden"', "HF_TOKEN"),
        ('TOKEN: str = "hidden"', "TOKEN"),
        ('user, self.password = "ann", b"hidden"', "password"),
        ('os.environ["AWS_SECRET_ACCESS_KEY"] = "hidden"', "AWS_SECRET_ACCESS_KEY"),
        ('os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "hidden")', "AWS_SECRET_ACCESS_KEY"),
        ('login(token="hidden")', "token"),
        ('login(**{"token": "hid" + "den"})', "token"),
        ('token = os.environ.get("X") or f"hidden{1}"', "token"),
        ('def login(user, token="hidden"): pass', "token"),
        ('def login(*, api_key="hidden"): pass', "api_key"),
        ('url = "https://host/?token=hidden"', "'url = \"https://host/?token=***\"'"),
    ],
)
def test_a_password_in_a_plugin_is_refused_and_not_shown(tmp_path: Path, line: str, what: str) -> None:
    message = f"mine.py, line 13: {what} seems to hold a password or token"
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        written(tmp_path, f"{NOTHING}\n{line}")
    assert "hidden" not in str(refusal.value)


@pytest.mark.parametrize(
    "line",
    [
        "#num_tokens=197",
        "x = 1  # layout;num_tokens=197&class_token=1",
        "shape = 'B;num_tokens=N'",
        'num_tokens = 197; token = os.environ["HF_TOKEN"]; HF_TOKEN = ""',
        'token = os.environ.get("HF_TOKEN", None)',
        "def f(class_token=None, *, pass_token): return dict(class_token=class_token, tokens=3)",
    ],
)
def test_what_is_no_password_is_taken_and_read_again(tmp_path: Path, line: str) -> None:
    stored = to_dict(model(written(tmp_path, f"{NOTHING}\n{line}")))
    read = from_dict(ModelConfig, stored).plugin
    assert read is not None
    assert read.text.endswith(line)


def test_a_distribution_that_is_listed_twice_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does none that has another part of the same package."""
    folders = {
        "site/mypos-1.0.dist-info": ("METADATA", "mypos", "RECORD", "mypos/joins.py,,\n"),
        "site/other-2.0.dist-info": ("METADATA", "other", "RECORD", "mypos/other.py,,\n"),
        "source/MyPos.egg-info": ("PKG-INFO", "MyPos", "SOURCES.txt", "source/mypos/joins.py\n"),
    }
    (tmp_path / "site/mypos").mkdir(parents=True)
    (tmp_path / "site/mypos/joins.py").write_text(NOTHING)
    for folder, (facts, name, files, listed) in folders.items():
        (tmp_path / folder).mkdir(parents=True)
        number = "2.0" if name == "other" else "1.0"
        (tmp_path / folder / facts).write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        (tmp_path / folder / files).write_text(listed)
        (tmp_path / folder / "top_level.txt").write_text("mypos\n")
    for folder in ("source", "site"):
        monkeypatch.syspath_prepend(tmp_path / folder)
    assert TrustedPlugin.read("mypos.joins").version == "mypos 1.0"


def test_line_ends_do_not_change_a_plugin(tmp_path: Path) -> None:
    """As git may write the same file with others elsewhere."""
    unix = written(tmp_path, NOTHING)
    (tmp_path / "windows.py").write_bytes(NOTHING.replace("\n", "\r\n").encode())
    assert TrustedPlugin.read(str(tmp_path / "windows.py")).identity == unix.identity


def test_an_option_with_a_digest_takes_that_text_alone() -> None:
    plugin = TrustedPlugin.read(str(EXAMPLE))
    assert TrustedPlugin.read(str(plugin)) == plugin
    with pytest.raises(ValueError, match=r"has sha256 .* and not 0123: put the file back"):
        TrustedPlugin.read(f"{EXAMPLE}@sha256:0123")


def test_a_module_of_an_installed_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "acme_positions"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "sizes.py").write_text("FACTOR = 2\n")
    (package / "joins.py").write_text(f"from .sizes import FACTOR\n{NOTHING}")
    monkeypatch.syspath_prepend(tmp_path)
    plugin = TrustedPlugin.read("acme_positions.joins")
    assert (plugin.name, plugin.version) == ("acme_positions.joins", "acme_positions")
    assert "acme_positions" not in sys.modules
    build_model(model(plugin, join="mine"))
    assert "acme_positions.sizes" in sys.modules


# --- the command line and the config --------------------------------------------------------------------------

EXAMPLE_WORDS = [f"--model.plugin={EXAMPLE}", "--model.bias=decay", "--model.join=gated"]


def test_a_name_of_the_file_is_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(["smoke", *reversed(EXAMPLE_WORDS)], description="")  # in any order
    assert (config.model.bias, config.model.join) == ("decay", "gated")
    with pytest.raises(SystemExit):
        parse(["smoke", *EXAMPLE_WORDS[:1], "--model.bias=decai"], description="")
    assert "pape, irpe_k, decay; did you mean decay?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["smoke", *EXAMPLE_WORDS[1:]], description="")
    assert "join='gated' is not known" in capsys.readouterr().err


def test_help_lists_its_names_and_imports_no_torch() -> None:
    code = (
        "import sys\nfrom lape_ray.commands.train import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    assert 'torch' not in sys.modules"
    )
    for words in (["--help", *EXAMPLE_WORDS], ["demo", "--model.plugin", str(EXAMPLE), "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "|irpe_k|decay" in done.stdout
        assert "|lape_gamma_norm|gated" in done.stdout


def test_the_dump_and_the_command_repeat_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(["smoke", *EXAMPLE_WORDS], description="")
    shown = f"{EXAMPLE}@sha256:{config.model.plugin.sha256}"  # type: ignore[union-attr]
    assert f"model.plugin = {shown}\n" in dump(config)
    words = command_line(config).split()
    assert parse(words[words.index("smoke") :], description="") == config


def test_a_stored_config_holds_the_text_and_no_trust(tmp_path: Path) -> None:
    config = parse(["smoke", *EXAMPLE_WORDS], description="")
    stored = to_dict(config)
    read = from_dict(TrainConfig, stored)
    assert type(read.model.plugin) is Plugin
    assert read.model.plugin.text == EXAMPLE.read_text()
    assert not differences(read, config)
    assert config_hash(read) == config_hash(config)
    (tmp_path / "elsewhere.py").write_text(EXAMPLE.read_text())
    moved = replace_fields(config, {"model.plugin": TrustedPlugin.read(str(tmp_path / "elsewhere.py"))})
    assert config_hash(moved) == config_hash(config)
    other = replace_fields(config, {"model.plugin": written(tmp_path, EXAMPLE.read_text() + "#")})
    (changed,) = differences(config, other)
    assert changed.startswith("model.plugin: 'sha256:")
    for wrong in ({"text": "import os"}, {"trusted": True}, {"sha256": "0"}):
        forged = {**stored, "model": {**stored["model"], "plugin": {**stored["model"]["plugin"], **wrong}}}
        with pytest.raises(ValueError, match=r"plugin.* is damaged|plugin has no field"):
            from_dict(TrainConfig, forged)


def _stored(tmp_path: Path, text: str, read_by: str) -> dict[str, Any]:
    """What a checkpoint of another version may hold."""
    values = to_dict(model(written(tmp_path, NOTHING), join="mine"))
    values["plugin"] |= {
        "text": text,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "read_by": read_by,
    }
    return values


def test_a_stored_name_that_has_become_ours_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = _stored(tmp_path, NOTHING, "Python 3.10.1, lape_ray 0.0.1")
    mine = written(tmp_path, NOTHING)
    monkeypatch.setitem(NAMES, "join", Literal["basic", "mine"])
    with pytest.raises(ValueError, match=r"line 11: join=mine is there already; choose another name"):
        model(mine)
    read = from_dict(ModelConfig, stored)
    for given in (TRUST, mine):
        plugin = trusted(read.plugin, given)  # type: ignore[arg-type]
        with pytest.raises(
            ValueError, match=r"is there already; use what it was stored by: Python 3\.10\.1, lape_"
        ):
            dataclasses.replace(read, plugin=plugin)


def test_a_stored_text_that_this_python_cannot_read_is_no_damage(tmp_path: Path) -> None:
    text = f"{NOTHING}x = ("
    read = from_dict(ModelConfig, _stored(tmp_path, text, "Python 3.99.0, lape_ray 9.0"))
    assert read.plugin is not None
    assert read.plugin.text == text
    with pytest.raises(
        ValueError, match=r"line 12: .*; use what it was stored by: Python 3\.99\.0, lape_ray 9"
    ):
        trusted(read.plugin, TRUST)
    older = from_dict(ModelConfig, _stored(tmp_path, text, "")).plugin
    with pytest.raises(ValueError, match=r"use what it was stored by: an earlier version"):
        trusted(older, TRUST)
    with pytest.raises(ValueError, match="join='a b' is not known"):
        from_dict(ModelConfig, {**_stored(tmp_path, text, ""), "join": "a b"})


# --- who runs it ----------------------------------------------------------------------------------------------


def test_a_stored_text_is_run_by_trust_alone(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    text = f"open({str(trace)!r}, 'w')\n{NOTHING}"
    given = written(tmp_path, text)
    stored = from_dict(ModelConfig, to_dict(model(given, join="mine"))).plugin
    assert stored is not None
    with pytest.raises(
        ValueError, match=r"mine\.py@sha256:.* is not run unasked: give the same file with --model\.plugin$"
    ):  # of a teacher, beside which there is no other option
        build_model(model(stored, join="mine"))
    with pytest.raises(ValueError, match=r"is not run unasked: .*plugin, or --trust-plugin"):
        trusted(stored, None)
    with pytest.raises(ValueError, match=r"it was trained with .* and not with .*my_positions"):
        trusted(stored, TrustedPlugin.read(str(EXAMPLE)))
    assert not trace.exists()
    assert trusted(stored, given) == given
    build_model(model(trusted(stored, TRUST), join="mine"))
    assert trace.exists()
    trace.unlink()
    build_model(model(stored, join="mine"))
    assert not trace.exists(), "it is run once in a process, and that it may be run again is known"


def test_another_process_needs_no_file(tmp_path: Path) -> None:
    """What Ray sends to workers and trials is the config, which holds the text and that it is trusted."""
    sent = pickle.dumps(model(TrustedPlugin.read(str(EXAMPLE)), join="gated", bias="decay"))
    code = (
        "import pickle, sys\nfrom lape_ray.model import build_model\n"
        "print(*build_model(pickle.load(sys.stdin.buffer)).state_dict())"
    )
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], input=sent, capture_output=True, cwd=tmp_path, env=environment
    )
    assert {b"join.gate_L", b"bias.table.slope_LH"} < {*done.stdout.split()}, done.stderr


def test_another_text_with_the_same_names_is_refused(tmp_path: Path) -> None:
    first = written(tmp_path, NOTHING)
    load(first)
    load(dataclasses.replace(first, name="elsewhere.py"))
    second = written(tmp_path, f"{NOTHING}# another")
    with pytest.raises(
        ValueError, match="line 11: mine is that of another text already, which this process has run"
    ):
        load(second)
    package = TrustedPlugin("acme.joins", "acme 1.0", first.sha256, first.text)
    with pytest.raises(ValueError, match="mine is that of another text already"):
        load(package)  # it may import other modules


@pytest.mark.parametrize(
    ("field", "table", "other"),
    [
        (
            "position",
            "ABSOLUTES = {'normal': AbsoluteKind(False, False, ramp)}",
            "CONDITIONALS = {'normal': Pointwise}",
        ),
        ("bias", "CONTENT_BIASES = {'keyed': Contextual}", "BIASES = {'keyed': Constant}"),
    ],
)
def test_another_kind_with_the_same_name_is_refused(
    tmp_path: Path, field: str, table: str, other: str
) -> None:
    """A network looks for a name in all dicts of its field, and would have both."""
    classes, _, _ = EVERYTHING.partition("ABSOLUTES = ")
    first, second = (written(tmp_path, classes + text) for text in (table, other))
    (name,) = first.names(field)
    before = build_model(model(first, **{field: name})).state_dict()
    with pytest.raises(ValueError, match=rf"line \d+: {name} is that of another text already"):
        load(second)
    assert build_model(model(first, **{field: name})).state_dict().keys() == before.keys()


# --- what it makes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "cell"),
    [
        pytest.param(family, cell, marks=[] if family in QUICK else pytest.mark.slow)
        for family, cell in itertools.product(FAMILIES, CELLS)
        if family != "swin_tiny" or cell.get("join") != "late"
    ],
    ids=str,
)
def test_every_kind_trains_in_every_family(tmp_path: Path, family: str, cell: dict[str, str]) -> None:
    torch.manual_seed(0)
    sizes = {"patch_size": None, "depth": None, **FAMILIES[family]}
    network = build_model(model(written(tmp_path, EVERYTHING), variant=family, **sizes, **cell))
    network(torch.randn(2, 3, 32, 32)).square().sum().backward()
    found = re.compile(r"(layers\.\d+\.)?(pos_embed|join|bias|rotary|conditional)\b")
    own = {name: parameter for name, parameter in network.named_parameters() if found.match(name)}
    assert own
    if family == "ceit_tiny":  # of its last block's attention nothing but the class token is read
        own = {name: each for name, each in own.items() if not name.startswith("bias.norms.1")}
    assert not [name for name, each in own.items() if each.grad is None or not each.grad.any()]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [LayerPosition()]", r"mine\.py: it gives fewer LayerPositions than there are layers \(2\)"),
        ("return [LayerPosition()] * 3", r"mine\.py: it gives more LayerPositions than there are layers \(2\)"),
        ("return [LayerPosition(residual_1ND=w_TND[:, :1])] * self.depth",
         r"mine\.py: layer 0: residual_1ND is \(1, 1, 32\), not \(1, 17, 32\)"),
        ("return [LayerPosition(attention_1ND=w_TND[..., :1])] * self.depth", r"attention_1ND is \(1, 17, 1\)"),
        ("return [LayerPosition(logits_1HNN=zeros(1, 2, 16, 16))] * self.depth", r"not \(1, 2, 17, 17\)"),
        ("return [LayerPosition(rotation=(zeros(2, 17, 4), zeros(2, 17, 8)))] * self.depth",
         r"rotation is \(2, 17, 4\), not \(2, 17, 8\)"),
        ("return [w_TND] * self.depth", r"mine\.py: AttributeError"),
        ("return 1 / 0", r"mine\.py, line 8: ZeroDivisionError: division by zero; docs/positions\.md"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_network_is_refused(tmp_path: Path, body: str, message: str) -> None:
    plugin = written(tmp_path, JOIN.format(body))
    with pytest.raises(ValueError, match=message):
        build_model(model(plugin, join="mine"))
    build_model(model(plugin, join="lape"))  # what is not used is not built


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import nothing_of_this_name\nJOINS = {'mine': 1}",
            r"mine\.py, line 1: ModuleNotFoundError: No module",
        ),
        (
            "JOINS = {'mine': 1}",
            r"line 1: JOINS\['mine'\] is 1 and not a class that extends Join; docs/positions",
        ),
        ("BIAS_JOINS = {'mine': 1}", r"BIAS_JOINS\['mine'\] is 1 and not of the kind Callable"),
        ("ABSOLUTES = {'mine': print}", "not of the kind AbsoluteKind"),
        ("BIASES = {'mine': 1}\nBIASES['other'] = 2", "BIASES is not the dict that is written there"),
        (
            JOIN.format("pass").replace("def forward", "def forwards"),
            "line 11: .*the class Mine lacks 'forward'",
        ),
        (EVERYTHING.replace("def frequencies", "def frequency"), "the class Slow lacks 'frequencies'"),
        (
            EVERYTHING.replace('field, layer = "contextual", Logits', 'field = "contextual"'),
            "Contextual lacks 'layer'",
        ),
    ],
)
def test_what_is_of_another_kind_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(written(tmp_path, text))


def test_the_check_leaves_a_network_as_it_was_made(tmp_path: Path) -> None:
    """A BatchNorm has seen no image, and what the file lets evaluate goes on to."""
    head, _, _ = EVERYTHING.partition("ABSOLUTES = ")
    text = head + (
        "class Normed(nn.Module):\n"
        "    def __init__(self, layout):\n"
        "        super().__init__()\n"
        "        self.norm, self.frozen = (nn.BatchNorm1d(layout.embed_dim) for _ in range(2))\n"
        "        self.frozen.eval()\n"
        "    def forward(self, x_BND):\n"
        "        return self.frozen(self.norm(x_BND.mT)).mT\n"
        "CONDITIONALS = {'normed': Normed}"
    )
    network = build_model(model(written(tmp_path, text), position="normed"))
    state = network.state_dict()
    assert state["conditional.norm.num_batches_tracked"] == 0
    assert state["conditional.norm.running_var"].eq(1).all()
    modes = {name: module.training for name, module in network.named_modules()}
    assert [name for name, training in modes.items() if not training] == ["conditional.frozen"]


def test_the_text_is_compiled_as_it_stands(tmp_path: Path) -> None:
    """Without our `from __future__ import annotations`."""
    load(written(tmp_path, f"{NOTHING}\ndef f(x: int): ...\nassert f.__annotations__ == {{'x': int}}"))


def test_sizes_that_do_not_fit_are_said_as_without_a_plugin() -> None:
    with pytest.raises(ValueError, match=r"^image_size=33 does not divide"):
        build_model(model(TrustedPlugin.read(str(EXAMPLE)), image_size=33))


def test_a_report_shows_its_maps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (seen,) = views(
        build_model(model(TrustedPlugin.read(str(EXAMPLE)), join="gated", bias="decay")), label="mine"
    )
    assert seen.correlation_LNN is not None
    assert seen.bias_LHPP is not None
    assert seen.bias_LHPP[1, 0, 0, 5] == pytest.approx(-0.1 * 2**0.5)
    late = build_model(model(written(tmp_path, EVERYTHING), join="late"))
    (seen,) = views(late, label="late", images_BCHW=torch.randn(2, 3, 32, 32))
    assert seen.correlation_LNN is not None
    assert seen.correlation_LNN[0].isnan().all(), "its first layer has no position"
    assert not seen.correlation_LNN[1].isnan().any()


def test_compilation_takes_it_as_one_graph() -> None:
    torch.manual_seed(0)
    network = build_model(model(TrustedPlugin.read(str(EXAMPLE)), join="gated", bias="decay"))
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), network(images))


# --- searches and exports -------------------------------------------------------------------------------------


def test_spaces_have_its_names(tmp_path: Path) -> None:
    plain = recipe("deit_tiny_lape")
    base = replace_fields(plain, {"model.plugin": TrustedPlugin.read(str(EXAMPLE))})
    joins = [cell["model.join"] for cell in build_space("joins", base, {}).cells]
    assert joins == ["basic", "share", "unshare", "lape", "lape_shared", "gated"]
    assert len(positions(plain).cells) == 600, "it is added where it was named"
    found = positions(base).cells
    assert {cell["model.bias"] for cell in found} >= {"decay", "none"}
    axes = parse_axes(["model.bias=choice(none,decay)"], base)
    assert len(build_space("free", base, axes).points()) == 2
    with pytest.raises(ValueError, match=r"--space model\.bias=.*bias='decay' is not known"):
        parse_axes(["model.bias=choice(none,decay)"], plain)
    with pytest.raises(ValueError, match=r"model\.plugin is no axis: put all embeddings into one file"):
        parse_axes([f"model.plugin=choice({EXAMPLE})"], base)


def test_no_published_code_has_it() -> None:
    plugin = TrustedPlugin.read(str(EXAMPLE))
    assert not_official(model(plugin)) is None
    assert not_official(model(plugin, join="gated")) == "no published code has join=gated"


def test_an_entry_of_a_config_json_is_data(tmp_path: Path) -> None:
    """Damage in it is named, and nothing is run."""
    (tmp_path / "config.json").write_text(
        '{"architecture": "deit_tiny", "pretrained_cfg": {}, "position": {"plugin": {"text": "x"}}}'
    )
    with pytest.raises(
        ValueError, match=r"config\.json: .*is damaged: its text is not the one of its sha256"
    ):
        timm_network(tmp_path / "model.safetensors")
