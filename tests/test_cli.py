"""The command line: from files as people write them to intervals, and errors of one line."""

import json
import random
import re
import shlex
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import bnnflow as bf
from bnnflow.cli import app, reading, work
from bnnflow.cli.columns import Inputs, Target, decimal_mark
from bnnflow.diagnosis import Diagnosis
from bnnflow.estimators import recipe

ROWS = 40


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Ensembles that take no time."""
    monkeypatch.setitem(
        work.METHODS, "ensemble", partial(bf.DeepEnsemble, members=3, steps=30)
    )


def run(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


def refused(*arguments):
    """Return the one line of an error."""
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def houses(path, rows=ROWS):
    g = np.random.default_rng(0)
    size, kind = g.uniform(20, 200, rows), g.choice(["flat", "house"], rows)
    price = (
        900 * size * np.where(kind == "house", 1.5, 1.0) * np.exp(g.normal(0, 0.1, rows))
    )
    lines = ["size,kind,sold,price,sort"]
    for i in range(rows):
        shown = "" if i % 7 == 3 else f"{size[i]:.1f}"
        word = "NA" if i % 9 == 5 else kind[i]
        sort = "dear" if price[i] > 100_000 else "cheap"
        lines.append(f'{shown},{word},2020-01-{1 + i % 28:02d},"{price[i]:,.0f}",{sort}')
    path.write_text("\n".join(lines) + "\n")
    return path


def fitted(tmp_path, *options, target="price"):
    data = houses(tmp_path / "houses.csv")
    done = run(
        *(
            "fit",
            data,
            "--target",
            target,
            "--out",
            tmp_path / "run",
            "--method",
            "ensemble",
        ),
        *options,
    )
    assert done.exit_code == 0, done.output
    return data, done


# ---------------------------------------- the commands


def test_fit_predict_check_and_report(tmp_path):
    data, done = fitted(tmp_path, "--drop", "sort")
    assert "on 4 rows that were held out: log_score" in done.stdout
    told = done.stderr
    assert "'price' has thousands separators" in told
    assert "'size': 6 missing, taken for the median" in told or "'size': 5 missing" in told
    assert "'kind': " in told
    assert "'sold' holds dates: days since 2020-01-01" in told
    here = tmp_path / "run"
    assert {each.name for each in here.iterdir()} == {
        *("asked.json", "columns.json", "held_out.csv", "model.bnn", "summary.json")
    }
    out = tmp_path / "predicted.csv"
    assert run("predict", here, data, "--level", "0.5", "-o", out).exit_code == 0
    rows = np.genfromtxt(out, delimiter=",", names=True)
    assert rows.dtype.names == ("mean", "sd", "low", "high")
    assert len(rows) == ROWS
    assert (rows["low"] < rows["mean"]).all()
    assert (rows["mean"] < rows["high"]).all()
    page = tmp_path / "page.html"
    assert run("report", here, data, "-o", page, "--unit", "<EUR>").exit_code == 0
    assert "RMSE (&lt;EUR&gt;)" in page.read_text()
    holed = pd.read_csv(data, dtype=str)
    holed.loc[0, "price"] = ""
    holed.to_csv(tmp_path / "holed.csv", index=False)
    assert "1 rows without a target" in run("report", here, tmp_path / "holed.csv").stderr
    verdict = run("check", here, "--json")
    found = json.loads(verdict.stdout)
    assert verdict.exit_code == found["code"]
    assert found["looked_at"] == "held-out rows"
    assert "members" in json.dumps(found["draws"])  # it is an approximation


@pytest.mark.parametrize(
    ("verdict", "code"),
    [
        ("trust", 0),
        ("trust predictions only", 0),
        ("trust with care", 1),
        ("do not trust", 3),
    ],
)
def test_the_exit_code_of_check_is_the_verdict(tmp_path, monkeypatch, verdict, code):
    fitted(tmp_path)
    monkeypatch.setattr(Diagnosis, "verdict", property(lambda self: verdict))
    assert run("check", tmp_path / "run").exit_code == code


def test_words_are_classes(tmp_path):
    data, done = fitted(tmp_path, "--drop", "price", "--json", target="sort")
    summary = json.loads(done.stdout)
    assert summary["task"] == "classification"
    assert set(summary["scores"]) == {"log_score", "accuracy"}
    found = json.loads(run("predict", tmp_path / "run", data, "--json").stdout)
    assert list(found) == ["sort", "p_cheap", "p_dear"]
    np.testing.assert_allclose(np.add(found["p_cheap"], found["p_dear"]), 1, atol=1e-6)
    assert run("report", tmp_path / "run").exit_code == 0


def test_numbers_are_classes_where_that_is_asked(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("x,y\n" + "".join(f"{i},{i % 2}\n" for i in range(30)))
    options = ("--target", "y", "--out", tmp_path / "run", "--method", "ensemble")
    assert run("fit", path, *options, "--task", "classification").exit_code == 0
    assert run("predict", tmp_path / "run", path).stdout.startswith("y,p_0,p_1\n")


def test_the_same_command_goes_on_or_is_done(tmp_path):
    data, done = fitted(tmp_path)
    options = (
        "fit",
        data,
        "--target",
        "price",
        "--out",
        tmp_path / "run",
        "--method",
        "ensemble",
    )
    again = run(*options)
    assert again.exit_code == 0
    assert "is finished" in again.stdout
    assert done.stdout.splitlines()[-2] in again.stdout
    assert "holds another run" in refused(*options, "--seed", "1")
    (tmp_path / "run" / "summary.json").unlink()  # as if it had been killed
    assert "is not finished" in refused("predict", tmp_path / "run", data)
    anew = run(*options)
    assert anew.exit_code == 0
    assert "is finished" not in anew.stdout
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    assert "thesis.tex" in refused(*options[:-3], tmp_path / "other")


def test_a_fit_that_was_killed_goes_on_with_its_chains(tmp_path, monkeypatch):
    data = houses(tmp_path / "houses.csv")
    gradients = []
    real, error = bf.BayesianModel.log_joint_and_grad, recipe.monte_carlo_error

    def counted(*arguments):
        gradients[-1] += 1
        return real(*arguments)

    def killed(*arguments):
        raise MemoryError

    def fit(name):
        gradients.append(0)
        options = ("--target", "price", "--network", "4", "--out", tmp_path / name)
        return run("fit", data, *options).exit_code

    monkeypatch.setattr(bf.BayesianModel, "log_joint_and_grad", counted)
    monkeypatch.setattr(recipe, "ROUNDS", 1)
    monkeypatch.setattr(recipe, "WARM_UP", 20)
    monkeypatch.setattr(recipe, "DRAWS", 20)
    assert fit("whole") == 0
    monkeypatch.setattr(recipe, "monte_carlo_error", killed)  # when the chains are done
    assert fit("run") != 0
    kept = tmp_path / "run" / "chains"
    assert bf.load(kept / "round-1" / "short").n_draws == 20
    monkeypatch.setattr(recipe, "monte_carlo_error", error)
    assert fit("run") == 0
    # the networks that chains begin with are trained again, but nothing is sampled again
    assert gradients[2] < gradients[0] - 20 * bf.MCLMC().thinning
    assert not kept.exists()
    whole, again = (run("predict", tmp_path / name, data) for name in ("whole", "run"))
    assert whole.stdout == again.stdout


def test_the_same_seed_gives_the_same_predictions(tmp_path):
    data = houses(tmp_path / "houses.csv")
    found = []
    for name in ("a", "b"):
        options = ("--target", "price", "--out", tmp_path / name, "--method", "ensemble")
        assert run("fit", data, *options, "--all-rows").exit_code == 0
        found.append(run("predict", tmp_path / name, data).stdout)
    assert found[0] == found[1]
    assert "held no rows out" in refused("report", tmp_path / "a")


def test_compare_scores_on_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setitem(work.METHODS, "vi", partial(bf.VI, steps=20))
    data = houses(tmp_path / "houses.csv")
    options = ("compare", data, "--target", "price", "--methods", "ensemble,vi")
    rows = json.loads(run(*options, "--json").stdout)
    assert [row["method"] for row in rows] == ["ensemble", "vi"]
    assert all({"log_score", "rmse", "coverage_90%", "seconds"} <= set(row) for row in rows)
    assert run(*options).stdout.splitlines()[0].split()[0] == "method"
    best = max(rows, key=lambda row: row["log_score"])
    assert best["standing"] == "best"
    assert best["to_best"] == 0
    for row in rows:
        assert row["to_best"] == pytest.approx(row["log_score"] - best["log_score"])
        assert row["standing"] in {"best", "equal", "worse", "undecided"}
    assert sum(row["stacking"] for row in rows) == pytest.approx(1)


def test_what_one_method_warns_of_has_its_name(tmp_path, monkeypatch):
    drawn = bf.VI.draw

    def doubtful(self, *given):
        warnings.warn("not settled", stacklevel=1)
        return drawn(self, *given)

    monkeypatch.setitem(work.METHODS, "vi", partial(bf.VI, steps=20))
    monkeypatch.setattr(bf.VI, "draw", doubtful)
    data = houses(tmp_path / "houses.csv")
    done = run("compare", data, "--target", "price", "--methods", "ensemble,vi")
    assert "vi: not settled" in done.stderr
    alone = run("compare", data, "--target", "price", "--methods", "vi")
    assert "note: not settled" in alone.stderr


def test_a_target_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("y,x,y,y_2\n1,2,3,4\n5,6,7,9\n")
    assert "several columns 'y'" in refused(
        "fit", path, "--target", "y", "--out", tmp_path / "r"
    )


def test_a_method_that_fails_is_a_line_of_the_comparison(tmp_path, monkeypatch):
    def fails():
        raise ValueError("no such luck")

    monkeypatch.setitem(work.METHODS, "vi", fails)
    data = houses(tmp_path / "houses.csv")
    done = run("compare", data, "--target", "price", "--methods", "ensemble,vi")
    assert "no such luck" in done.stdout.splitlines()[2]


def test_an_interrupted_comparison_keeps_the_methods_that_are_done(tmp_path, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setitem(work.METHODS, "vi", interrupted)
    data = houses(tmp_path / "houses.csv")
    options = ("compare", data, "--target", "price", "--methods")
    done = run(*options, "ensemble,vi,laplace")
    assert done.exit_code == 0
    assert "not compared: vi, laplace" in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["method", "ensemble"]
    assert run(*options, "vi,ensemble").exit_code == 130


def test_parquet_says_the_same_as_csv(tmp_path):
    polars = pytest.importorskip("polars")
    columns = {
        "x": [1.5, None, 3.25],
        "n": [1, 2, 3],
        "b": [True, False, None],
        "w": ["a", "b", ""],
    }
    polars.DataFrame(columns).write_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text("x,n,b,w\n1.5,1,True,a\n,2,False,b\n3.25,3,,\n")
    one, other = (reading.read(tmp_path / name, []) for name in ("t.parquet", "t.csv"))
    assert {k: v.tolist() for k, v in one.items()} == {
        k: v.tolist() for k, v in other.items()
    }
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 is not enough")
    assert "bad.parquet" in refused(
        "fit", tmp_path / "bad.parquet", "--target", "x", "--out", "r"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("fit",), "Missing argument 'data'"),
        (("fitt",), "No such command 'fitt'"),
        (("--nothing",), "No such option"),
        (("fit", "none.csv", "--target", "y", "--out", "r"), "none.csv is not"),
        (
            ("fit", "{data}", "--target", "cost", "--out", "r"),
            "it has size, kind, sold, price",
        ),
        (
            ("fit", "{data}", "--target", "price", "--out", "r", "--method", "mcmc"),
            "--method",
        ),
        (
            ("fit", "{data}", "--target", "price", "--out", "r", "--network", "a"),
            "--network",
        ),
        (("fit", "{data}", "--target", "price", "--out", "r", "--network", "0"), "network"),
        (("fit", "{data}", "--target", "price", "--out", "r", "--draws", "0"), "n_draws"),
        (
            ("fit", "{data}", "--target", "price", "--out", "r", "--draws", "many"),
            "--draws",
        ),
        (
            ("fit", "{data}", "--target", "price", "--out", "r", "--likelihood", "t"),
            "likelihood",
        ),
        (("fit", "{data}", "--target", "price", "--out", "r", "--task", "both"), "--task"),
        (
            ("fit", "{data}", "--target", "sort", "--out", "r", "--task", "regression"),
            "words",
        ),
        (("fit", "{data}", "--target", "sold", "--out", "r"), "dates"),
        (("fit", "{data}", "--target", "price", "--out", "{data}"), "is a file"),
        (
            ("fit", "{data}", "--target", "price", "--out", "r", "--separator", "ab"),
            "--separator",
        ),
        (("predict", "nowhere", "{data}"), "holds no run"),
        (("check", "nowhere"), "holds no run"),
        (("compare", "{data}", "--target", "price", "--methods", ","), "--methods"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    data = houses(tmp_path / "houses.csv")
    assert said in refused(*(each.format(data=data) for each in options))


def test_unexpected_errors_are_one_line_too(tmp_path, monkeypatch):
    def broken(*_):
        raise KeyError("deep inside")

    monkeypatch.setattr(work, "check", broken)
    assert "KeyError: 'deep inside' (--debug shows where)" in refused("check", tmp_path)
    assert isinstance(run("check", tmp_path, "--debug").exception, KeyError)


def test_predict_refuses_other_columns(tmp_path):
    fitted(tmp_path, "--drop", "sort")
    (tmp_path / "new.csv").write_text("size,kind\n3,flat\n")
    assert "sold" in refused("predict", tmp_path / "run", tmp_path / "new.csv")
    (tmp_path / "new.csv").write_text("size,kind,sold\nbig,flat,2020-01-01\n")
    assert "'size': 1 cells are no numbers" in refused(
        "predict", tmp_path / "run", tmp_path / "new.csv"
    )
    (tmp_path / "new.csv").write_text(
        "size,kind,sold\n9,flat,2020-01-01\nbig,tent,2020-01-01\n"
    )
    done = run("predict", tmp_path / "run", tmp_path / "new.csv")
    assert "taken for missing" in done.stderr
    assert "kind (1 rows)" in done.stderr
    assert "--level" in refused(
        "predict", tmp_path / "run", tmp_path / "new.csv", "--level", "2"
    )


def test_help_has_examples():
    assert "bnnflow fit houses.csv --target price --out run" in run().stdout
    for command in ("fit", "predict", "report", "compare", "check"):
        done = run(command, "--help")
        assert done.exit_code == 0
        assert f"bnnflow {command} " in done.stdout.split("Usage:")[1].split("\n", 1)[1]


def test_commands_of_the_tables_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(work.METHODS, "vi", partial(bf.VI, steps=20))
    houses(tmp_path / "houses.csv")
    houses(tmp_path / "new.csv", rows=5)
    page = (Path(__file__).parents[1] / "docs" / "tables.md").read_text()
    (block,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    codes = {}
    for line in block.splitlines():
        program, command, *options = shlex.split(line)
        assert program == "bnnflow"
        if command == "fit":
            options += ["--method", "ensemble"]  # which takes no time
        if command == "compare":
            options += ["--network", "4"]
        codes[command] = run(command, *options).exit_code
    assert codes.pop("check") in (0, 1, 3)  # a verdict
    assert codes == {"fit": 0, "predict": 0, "report": 0, "compare": 0}
    assert len((tmp_path / "predicted.csv").read_text().splitlines()) == 6


def test_the_package_is_a_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bnnflow", "check", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"bnnflow: {tmp_path} holds no run: make one by bnnflow fit\n"


# ---------------------------------------- reading


def table(tmp_path, content, **options):
    """Return the columns of a file as they would be fitted, and what was told."""
    path = tmp_path / "table.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    notes = []
    raw = reading.read(path, notes, **options)
    rows = np.ones(len(next(iter(raw.values()))), bool)
    inputs = Inputs.learn(raw, rows, decimal_mark(raw), notes)
    return {k: v.tolist() for k, v in inputs.apply(raw, []).items()}, "\n".join(notes)


@pytest.mark.parametrize(
    ("content", "columns", "told"),
    [
        ("a,b\n1,x\n2,y\n", {"a": [1, 2], "b": ["x", "y"]}, ""),
        ("a;b\n1,5;x\n2;y\n", {"a": [1.5, 2], "b": ["x", "y"]}, "decimal commas"),
        ("a\tb\n1\tx\n2\ty\n", {"a": [1, 2], "b": ["x", "y"]}, "tabs"),
        ("a|b\r\n1|x\r\n2|y\r\n", {"a": [1, 2], "b": ["x", "y"]}, "bars"),
        ("sep=;\na;b\n1;x\n2;y\n", {"a": [1, 2], "b": ["x", "y"]}, "semicolons"),
        ('a,b\n"1,234",1\n"2,000,000",2\n', {"a": [1234, 2e6], "b": [1, 2]}, "thousands"),
        ("a;b\n1.234;1,5\n5.678;2,5\n", {"a": [1234, 5678], "b": [1.5, 2.5]}, "thousands"),
        ("a;b\n1 234,5;1\n2 000,5;2\n", {"a": [1234.5, 2000.5], "b": [1, 2]}, "thousands"),
        ("a,b\n1.234,1\n5.678,2\n", {"a": [1.234, 5.678], "b": [1, 2]}, ""),
        ("a,b\n$5,1\n$6,2\n", {"a": [5, 6], "b": [1, 2]}, "'$' is taken off"),
        ("a,b\n5 %,1\n6 %,2\n", {"a": [5, 6], "b": [1, 2]}, "'%' is taken off"),
        ("a,b\n\u22125,1\n1e3,2\n", {"a": [-5, 1000], "b": [1, 2]}, ""),
        (
            "z,b\n01234,1\n99999,2\n",
            {"z": ["01234", "99999"], "b": [1, 2]},
            "leading zeros",
        ),
        ("a,b\n9007199254740993,1\n1,2\n", {"a": ["9007199254740993", "1"]}, "16 digits"),
        ("a,b\n1,\ufeffx\n2,x\u200b\n", {"a": [1, 2], "b": ["x", "x"]}, "invisible"),
        ("a,b\n1,2\n\n3,4\n\n", {"a": [1, 3], "b": [2, 4]}, "1 blank lines"),
        ("a,b\nnan,1\n3,2\n5,3\n", {"a is missing": [1, 0, 0], "a": [4, 3, 5]}, "median 4"),
        ("a,b\nx,1\nNA,2\nNone,3\n", {"a": ["x", "missing", "None"]}, "1 missing"),
        (
            "a,a,\n1,2,3\n4,5,7\n",
            {"a": [1, 4], "a_2": [2, 5], "column_3": [3, 7]},
            "no name",
        ),
        (",a,b\n0,5,6\n1,7,8\n", {"a": [5, 7], "b": [6, 8]}, "numbers the rows"),
        (
            "d,b\n2020-01-01,1\n2020-01-03T12:00,2\n",
            {"d": [0, 2.5]},
            "days since 2020-01-01",
        ),
        ('a,b\n"x\ny",1\n"say ""z""",2\n', {"a": ["x\ny", 'say "z"']}, "line breaks"),
        ("1,2\n3,4\n5,6\n", {"1": [3, 5], "2": [4, 6]}, "numbers only"),
        ("a,b\n,1\n,2\n", {"b": [1, 2]}, "'a' is empty"),
    ],
)
def test_what_a_table_holds(tmp_path, content, columns, told):
    found, notes = table(tmp_path, content)
    assert found.items() >= columns.items()
    assert told in notes
    repairs = [note for note in notes.splitlines() if "holds words" not in note]
    assert told or not repairs


@pytest.mark.parametrize(
    ("start", "step", "told"), [(0, 1, True), (7, 1, True), (0, 2, False)]
)
def test_a_column_that_numbers_the_rows_is_told(tmp_path, start, step, told):
    rows = [f"{start + i * step},{i % 3}" for i in range(30)]
    found, notes = table(tmp_path, "\n".join(["id,a", *rows]))
    assert set(found) == {"id", "a"}
    assert ("leave it out by --drop id" in notes) == told


@pytest.mark.parametrize(
    ("encoding", "told"),
    [
        ("utf-8", ""),
        ("utf-8-sig", ""),
        ("utf-16", ""),
        ("utf-16-le", ""),
        ("utf-16-be", ""),
        ("utf-32", ""),
        ("latin-1", "not UTF-8"),
    ],
)
def test_encodings(tmp_path, encoding, told):
    found, notes = table(tmp_path, "größe,b\n1,x\n2,é\n".encode(encoding))
    assert found == {"größe": [1, 2], "b": ["x", "é"]}
    assert told in notes


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"  \n\n", "empty"),
        (b"\xff\xfe\n\x00", "empty"),
        (b'""', "nothing"),
        (b"a,b\n", "no rows"),
        (b"a,a is missing\n1,1\n,2\n", "rename"),
        (b"a,b\n1,2\n3\n", "line 3 has 1 cells, the header 2"),
        (b"a,b\n1,2\n3,4,5\n", "line 3 has 3 cells"),
        (b'a,b\n1,"2\n3,4\n', "quote left open"),
        (b"a,b\n1,\x002\n", "zero bytes"),
        (b"PK\x03\x04 and so on", "spreadsheet"),
        (b"a;b,c\n1;2,3\n4;5,6\n", "commas or semicolons"),
        (b"a,b\n1,5.5\n2,inf\n", "infinite"),
        (b"a,b\n1,1e999\n2,3\n", "too large"),
        (b'a,b\n1.5,1\n"1,5",2\n', "mixes decimal points and commas"),
        (b"a,b\n5%,1\n6,2\n", "mixes numbers with"),
        (b"d,b\n03/04/2020,1\n04/05/2020,2\n", "03/04/2020"),
        (b"d,b\n3 Apr 2020,1\n4 May 2020,2\n", "several ways"),
        (b"d,b\n2020-13-45,1\n2020-01-01,2\n", "there is no date"),
        (b"d,b\n12:30,1\n13:30,2\n", "dates or times"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, content, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        table(tmp_path, content)


def test_ten_thousand_columns(tmp_path):
    g = np.random.default_rng(0)
    lines = [",".join(f"c{i}" for i in range(10_000))]
    lines += [",".join(f"{v:.3f}" for v in row) for row in g.normal(size=(3, 10_000))]
    found, _ = table(tmp_path, "\n".join(lines))
    assert len(found) == 10_000


@pytest.mark.parametrize(
    ("values", "task", "read"),
    [
        (["1", "2", "2.5"], "regression", [1, 2, 2.5]),
        (["yes", "no", "yes"], "classification", ["yes", "no", "yes"]),
        (["True", "False", "True"], "classification", ["True", "False", "True"]),
        (["€ 1", "€ 2", "€ 3"], "regression", [1, 2, 3]),
    ],
)
def test_targets(values, task, read):
    target = Target.look("y", np.array(values, object), "auto", None, [])
    assert target.task == task
    assert target.read(np.array(values, object), []).tolist() == read


# ---------------------------------------- the fuzzer

BREAKS = {
    "separator": lambda text, g: text.replace(",", g.choice([";", "\t", "|", " ", ",,"])),
    "quote": lambda text, g: insert(text, g, g.choice(['"', "'", '""'])),
    "words": lambda text, g: replaced(
        text, g, g.choice(["oops", "N/A", "nan", "-", "?", "inf"])
    ),
    "numbers": lambda text, g: replaced(
        text, g, g.choice(['"1,234"', "1e999", "$5", "5%", "0x1"])
    ),
    "dates": lambda text, g: replaced(
        text, g, g.choice(["2020-01-01", "1/2/2020", "12:30"])
    ),
    "names": lambda text, g: (
        g.choice(["x,x,y\n", ",,y\n", "x,,y\n", "y,y,y\n"]) + body(text)
    ),
    "header": lambda text, g: body(text),
    "ragged": lambda text, g: insert(text, g, g.choice([",", "\n", ",5\n"])),
    "rows": lambda text, g: "\n".join(text.split("\n")[: g.choice([0, 1, 2, 3])]),
    "class": lambda text, g: text.replace("odd", "even"),
    "zero": lambda text, g: insert(text, g, "\x00"),
    "empty": lambda text, g: replaced(text, g, ""),
    "endings": lambda text, g: text.replace("\n", g.choice(["\r\n", "\r", "\n\n"])),
    "wide": lambda text, g: "".join(
        f"{line},{','.join(str(i * 7 % 5 + k) for k in range(g.choice([5, 300])))}\n"
        for i, line in enumerate(text.split("\n"))
    ),
    "letters": lambda text, g: insert(
        text, g, g.choice(["é", "\ufeff", "日", "\u202f", "\x85"])
    ),
}
ENCODINGS = ["utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252", "latin-1", "utf-16-le"]


def body(text):
    return text.partition("\n")[2]


def insert(text, g, piece):
    at = g.randrange(len(text) + 1)
    return text[:at] + piece + text[at:]


def replaced(text, g, cell):
    """Put something else into one to all cells of a column."""
    lines = [line.split(",") for line in text.split("\n")]
    column, share = g.randrange(3), g.choice([0.02, 0.3, 1.0])
    for line in lines[1:]:
        if len(line) > column and g.random() < share:
            line[column] = cell
    return "\n".join(map(",".join, lines))


def malformed(seed):
    """Return the bytes of a table of which one to three things are broken."""
    g = random.Random(seed)
    text = "x,w,y\n" + "".join(
        f"{i / 3:.2f},{g.choice('abc')},{g.choice(['odd', 'even']) if seed % 2 else i}\n"
        for i in range(30)
    )
    for name in g.sample(sorted(BREAKS), g.choice([1, 1, 2, 3])):
        text = BREAKS[name](text, g)
    return text.encode(g.choice(ENCODINGS), errors="replace")


def check_malformed(seed, folder):
    """Fit and predict a broken file: both work, or the first ends in one line that says why."""
    path = Path(folder) / f"{seed}.csv"
    path.write_bytes(malformed(seed))
    out = Path(folder) / f"run{seed}"
    options = ("--target", "y", "--out", out, "--method", "ensemble", "--network", "2")
    done = run("fit", path, *options)
    if done.exit_code:
        assert done.exit_code == 2, (seed, done.output, done.exception)
        assert done.stderr.startswith("bnnflow: "), (seed, done.stderr)
        assert done.stderr.count("\n") == 1, (seed, done.stderr)
        assert "--debug" not in done.stderr, (seed, done.stderr)
        return
    again = run("predict", out, path)
    assert again.exit_code == 0, (seed, again.output)
    assert "nan" not in again.stdout.partition("\n")[2], (seed, again.stdout)


@pytest.mark.parametrize("seed", range(30))
def test_malformed_files(seed, tmp_path):
    check_malformed(seed, tmp_path)


@pytest.mark.validate
def test_300_malformed_files(tmp_path):
    for seed in range(300):
        check_malformed(seed, tmp_path)
