"""No code comes out of files: what the package's source never does, planted files that would run something, and what it brings along."""

import ast
import hashlib
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from featlas.errors import FeatlasError
from featlas.model.dictionary_sources import _folder_readers
from featlas.model.loading import load_model

ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("", "model", "ingest", "queries", "analysis", "pages") for path in sorted((ROOT / folder).glob("*.py"))]

FORBIDDEN_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "code", "xmlrpc"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load",
    "tempfile.mktemp", "shutil.unpack_archive",
}  # fmt: skip
FORBIDDEN_METHODS = {"extractall", "read_pickle", "to_pickle", "load_module", "add_safe_globals"}
MUST_BE = {"allow_pickle": "False", "trust_remote_code": "False", "shell": "False", "weights_only": "True", "use_safetensors": "True"}
MUST_BE |= {"verify": "True"}


def unsafe(text: str) -> Iterator[str]:
    """What a source does that could run what a file or a user brings: `line: what`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"{node.lineno}: import {name}" for name in names if name.partition(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in FORBIDDEN_CALLS or (isinstance(node.func, ast.Attribute) and node.func.attr in FORBIDDEN_METHODS):
                yield f"{node.lineno}: {called}"
            for keyword in node.keywords:
                wanted = MUST_BE.get(keyword.arg or "")
                if wanted is not None and ast.unparse(keyword.value) != wanted:
                    yield f"{node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}"
            if called in ("np.load", "numpy.load") and all(keyword.arg != "allow_pickle" for keyword in node.keywords):
                yield f"{node.lineno}: np.load without allow_pickle=False"


@pytest.mark.parametrize("text", [
    "import pickle", "from joblib import load", "torch.load(f)", "np.load(f)", "np.load(f, allow_pickle=True)", "eval(x)", "exec(x)",
    "yaml.load(f)", "AutoModel.from_pretrained(f, trust_remote_code=True)", "subprocess.run(x, shell=True)", "tempfile.mktemp()",
    "archive.extractall(d)",
    "f(use_safetensors=None)", "requests.get(u, verify=False)",
])  # fmt: skip
def test_the_rule_finds_what_it_forbids(text: str) -> None:
    assert list(unsafe(text))


@pytest.mark.slow
def test_no_source_runs_what_a_file_brings() -> None:
    assert len(SOURCES) > 100
    found = [f"{path.relative_to(ROOT)}:{what}" for path in SOURCES for what in unsafe(path.read_text(encoding="utf-8"))]
    assert found == []


# --- planted files ----------------------------------------------------------------------------------------------------


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.mark), "w")


def test_a_planted_object_would_run_if_it_were_read(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Planted(tmp_path / "ran"))).close()
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl", "model.safetensors"])
def test_a_planted_model_is_refused(name: str, tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    (folder / name).write_bytes(pickle.dumps(Planted(mark)))
    with pytest.raises(FeatlasError, match=r"safetensors|does not load"):
        load_model(str(folder))
    assert not mark.exists()


def test_a_model_that_brings_code_is_refused(tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\n")
    (folder / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}}')
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(FeatlasError):
        load_model(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["sae_weights.pt", "ae.pt", "sae_weights.safetensors"])
def test_a_planted_dictionary_is_refused(name: str, tmp_path: Path) -> None:
    folder, mark = tmp_path / "resid_0", tmp_path / "ran"
    folder.mkdir()
    (folder / "cfg.json").write_text("{}")
    (folder / name).write_bytes(pickle.dumps(Planted(mark)))
    with pytest.raises(FeatlasError):
        {site: read() for site, read in _folder_readers(tmp_path).items()}
    assert not mark.exists()


def test_planted_arrays_are_refused(tmp_path: Path) -> None:
    """The samples' file: an array of objects is pickled by numpy itself."""
    mark = tmp_path / "ran"
    array = np.empty(1, dtype=object)
    array[0] = Planted(mark)
    np.savez(tmp_path / "resid_0.npz", values=array)
    with np.load(tmp_path / "resid_0.npz", allow_pickle=False) as file, pytest.raises(ValueError, match="allow_pickle=False"):
        file["values"]
    assert not mark.exists()


# --- what the package brings along ------------------------------------------------------------------------------------


def test_vendored_scripts_are_those_that_are_named() -> None:
    folder = ROOT / "pages" / "vendor"
    told = (folder / "README.md").read_text()
    for file in folder.glob("*.js"):
        line = next(line for line in told.splitlines() if line.startswith(f"| `{file.name}`"))
        assert hashlib.sha256(file.read_bytes()).hexdigest() in line, file.name
        assert (folder / f"{file.name.removesuffix('.min.js')}.LICENSE").exists()


def test_java_is_pinned_to_versions() -> None:
    pom = (ROOT / "queries" / "pom.xml").read_text()
    versions = re.findall(r"<(?:[\w.]+\.)?version>([^<]+)<", pom)
    assert versions
    assert all(re.fullmatch(r"\d[\w.]*|\$\{[\w.]+\}", version) for version in versions), versions
    assert not re.search(r"<repositor(y|ies)>|http://(?!maven\.apache\.org/POM)", pom)

