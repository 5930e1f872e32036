"""Expected errors: their exit codes, what stands for one, and what a reader's errors become."""

import errno
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import texforce
from texforce import cli, errors
from texforce.errors import ArtifactError, InputError, NotFoundError, OutOfMemory, StorageError, expected, reading

from .commands import invoke

EXIT_CODES = {
    "InputError": 2, "NotFoundError": 2, "ArtifactError": 3, "DivergedError": 4, "StorageError": 5, "OutOfMemory": 5,
    "ProcessLost": 5, "RewardError": 6,
}  # fmt: skip
BUGS = [
    ValueError("not enough values to unpack"), KeyError("weight"), zipfile.BadZipFile("File is not a zip file"),
    RuntimeError("shapes differ"), OSError("no error number"), AttributeError("no such name"), AssertionError(),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "out/state.json"),
]  # fmt: skip


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def end_with(error: BaseException, monkeypatch):
    """What `texforce eval` does when its configuration raises an error."""

    def fail(options):
        raise error

    monkeypatch.setattr(cli, "resolve_eval", fail)
    return invoke("eval")


# --- exit codes ---


def test_every_class_has_its_exit_code_and_no_other_class_is_expected():
    assert {
        kind.__name__: kind.exit_code for kind in subclasses(errors.TexforceError) - {errors.TexforceError}
    } == EXIT_CODES


@pytest.mark.parametrize("name", EXIT_CODES)
def test_a_command_ends_with_an_errors_exit_code_and_its_message_alone(name, monkeypatch):
    result = end_with(getattr(errors, name)("file.txt: is too long"), monkeypatch)
    assert (result.exit_code, type(result.exception)) == (EXIT_CODES[name], SystemExit)
    assert result.stderr.startswith("error: file.txt: is too long")
    assert "Traceback" not in result.output


def test_bad_input_is_a_value_error_and_what_is_not_there_a_file_not_found_error_too():
    assert issubclass(InputError, ValueError)
    assert issubclass(NotFoundError, InputError)
    assert issubclass(NotFoundError, FileNotFoundError)
    assert isinstance(expected(NotFoundError("absent.txt is not there")), NotFoundError)  # and no error of the disk


@pytest.mark.parametrize("error", BUGS, ids=lambda error: type(error).__name__)
def test_any_other_error_is_a_bug_and_is_not_hidden(error, monkeypatch):
    assert expected(error) is None
    result = end_with(error, monkeypatch)
    assert (result.exit_code, result.exception) == (1, error)
    assert "error: " not in result.stderr


def test_a_bug_ends_the_process_with_one_and_its_traceback():
    program = (
        "import sys; from texforce import cli; cli.resolve_eval = lambda options: {}['weight']; sys.argv[1:] = ['eval']"
    )
    folder = Path(texforce.__file__).parent
    done = subprocess.run([sys.executable, "-c", f"{program}; cli.app()"], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.rstrip().endswith("KeyError: 'weight'")


# --- what stands for an expected error ---


def test_an_expected_error_is_itself():
    error = ArtifactError("weights.safetensors: it is damaged")
    assert expected(error) is error


@pytest.mark.parametrize("number", sorted(errors.STORAGE | errors.OUTPUT_PLACE))
def test_an_error_of_the_disk_is_a_storage_error_that_names_the_file(number):
    error = OSError(number, "the cause", "out/metrics.jsonl")
    known = expected(error)
    assert isinstance(known, StorageError)
    assert str(known) == "storage: the cause: out/metrics.jsonl"


def test_an_error_of_the_disk_without_a_file_is_a_storage_error_too():
    assert str(expected(OSError(errno.EIO, "Input/output error"))) == "storage: Input/output error"


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ECONNREFUSED, errno.ENOENT, errno.EBADF])
def test_an_error_of_a_pipe_a_connection_or_our_own_code_is_no_error_of_the_disk(number):
    assert expected(OSError(number, "the cause")) is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        MemoryError("Unable to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ValueError("can't allocate memory"),
    ],
    ids=["of a GPU", "of Python", "of torch on the CPU", "of cuBLAS", "of CUDA", "of the system", "of another class"],
)
def test_a_lack_of_memory_is_told_with_its_first_line(error):
    known = expected(error)
    assert isinstance(known, OutOfMemory)
    assert str(known) == f"out of memory ({str(error).splitlines()[0]})"


# --- reading ---


def read(error: BaseException, kind: type = ArtifactError):
    with reading("adapter: 'mine.safetensors'", kind):
        raise error


@pytest.mark.parametrize("kind", [ArtifactError, InputError, NotFoundError])
@pytest.mark.parametrize("error", BUGS, ids=lambda error: type(error).__name__)
def test_whatever_a_reader_raises_becomes_the_kind_that_is_asked_for_and_names_the_file(error, kind):
    with pytest.raises(kind, match=r"^adapter: 'mine\.safetensors': .") as caught:
        read(error, kind)
    assert type(caught.value) is kind
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ValueError("header too large\nat byte 8\nat byte 9"), "header too large"),
        (ValueError("\n\n  the first line that holds anything\nand another"), "the first line that holds anything"),
        (KeyError("lora_alpha"), "KeyError 'lora_alpha'"),
        (EOFError(), "EOFError"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x/y"), "No such file or directory"),
        (RuntimeError("Errors:\n\tsize mismatch of a.weight\nand b"), "Errors: size mismatch of a.weight"),
        (ValueError("x" * 1000), "x" * 300),
    ],
    ids=["of three lines", "empty lines first", "key", "no text", "disk", "heading", "long"],
)
def test_the_cause_is_the_first_line_of_what_the_reader_says(error, cause):
    with pytest.raises(ArtifactError) as caught:
        read(error)
    assert str(caught.value) == f"adapter: 'mine.safetensors': {cause}"


def test_torchs_advice_to_run_a_files_code_is_never_passed_on(tmp_path):
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(Path("anything but a tensor"), protocol=2))
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(tmp_path / "weights.pt", weights_only=True)
    with pytest.raises(ArtifactError, match=r"^weights\.pt: .*could run code$") as caught, reading("weights.pt"):
        torch.load(tmp_path / "weights.pt", weights_only=True)
    assert "weights_only" not in str(caught.value)


def test_a_model_that_asks_to_run_code_is_told_apart():
    with pytest.raises(InputError, match=r": it asks to run code of its author, which texforce never does$"):
        read(ValueError("Loading it requires code in that repo; set `trust_remote_code=True` to allow it."), InputError)


@pytest.mark.parametrize("text", ["no file in /models/weights_only/a.bin", "no file weights_only.pt", r"no C:\weights_only"])
def test_a_path_that_is_called_like_a_switch_is_no_advice(text):
    with pytest.raises(ArtifactError) as caught:
        read(ValueError(text))
    assert str(caught.value).endswith(f": {text}")


@pytest.mark.parametrize("switch", errors.SAFETY_SWITCHES)
def test_no_librarys_advice_to_switch_a_safety_off_is_passed_on(switch):
    with pytest.raises(ArtifactError) as caught:
        read(ValueError(f"it cannot be loaded\nPlease set {switch} to go on"))
    assert switch not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "x"),
        PermissionError(errno.EACCES, "Permission denied", "x"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("can't allocate memory: you tried to allocate 9 bytes"),
        InputError("eta: must be above 0"),
        StorageError("storage: the disk is full"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_disk_lack_of_memory_and_expected_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as caught:
        read(error)
    assert caught.value is error


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, StorageError), (errno.ENOMEM, OutOfMemory)])
def test_what_safetensors_says_of_the_disk_or_of_memory_is_no_fault_of_the_file(number, kind):
    with pytest.raises(OSError, match=r"mine\.safetensors") as caught:
        read(SafetensorError(f"Error while deserializing: I/O error: the cause (os error {number})"))
    assert caught.value.errno == number
    assert isinstance(expected(caught.value), kind)
    with pytest.raises(ArtifactError):
        read(SafetensorError("I/O error: No such file or directory (os error 2)"))
