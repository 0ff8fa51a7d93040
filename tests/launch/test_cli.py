from __future__ import annotations

import pytest

from trainer.cli import config_parser, positive, run_main
from trainer.errors import ConfigError, UserError


def exit_code(main: object) -> object:
    with pytest.raises(SystemExit) as caught:
        run_main(main)  # type: ignore[arg-type]
    return caught.value.code


@pytest.mark.parametrize("code", [0, 1, 3])
def test_the_code_of_main_is_the_exit_code(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["prog", "a", "b=c"])
    given: list[list[str]] = []
    assert exit_code(lambda argv: given.append(argv) or code) == code
    assert given == [["a", "b=c"]]


@pytest.mark.parametrize("error", [UserError, ConfigError])
def test_user_errors_are_one_line_and_exit_code_2(
    error: type[UserError], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def main(argv: list[str]) -> int:
        raise error("data.root: missing\n  build it")

    assert exit_code(main) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "error: data.root: missing build it\n"


def test_other_ranks_exit_alike_and_say_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(argv: list[str]) -> int:
        raise UserError("x")

    monkeypatch.setenv("LOCAL_RANK", "1")
    assert exit_code(main) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert exit_code(main) == 2
    assert capsys.readouterr().err == "error: x\n"


def test_errors_of_the_program_itself_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_main(lambda argv: 1 // 0)


def test_interrupts_exit_as_shells_report_them() -> None:
    def main(argv: list[str]) -> int:
        raise KeyboardInterrupt

    assert exit_code(main) == 130


@pytest.mark.parametrize("argv", [[], ["--config"], ["--config", "x", "--unknown"], ["--conf", "x"]])
def test_argument_errors_are_user_errors(argv: list[str]) -> None:
    with pytest.raises(UserError, match="--help"):
        config_parser("d").parse_args(argv)


def test_a_config_and_its_dotlist() -> None:
    options = config_parser("d").parse_intermixed_args(["a.b=1", "--config", "x.yaml", "c.d=[1,2]"])
    assert (options.config, options.overrides) == ("x.yaml", ["a.b=1", "c.d=[1,2]"])


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", ""])
def test_positive_refuses(text: str) -> None:
    parser = config_parser("d")
    parser.add_argument("--number", type=positive)
    with pytest.raises(UserError, match="--number"):
        parser.parse_args(["--config", "x", f"--number={text}"])
