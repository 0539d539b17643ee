"""What the tests share: a way to run a script as a user does, and small things to run it on.

Nothing here needs a network or anything outside the repository. The scripts run from an empty folder, with
all they write below pytest's temporary folder, but for built-in sets in data/raw/.
"""
import contextlib
import functools
import importlib.util
import io
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

os.environ['CUDA_VISIBLE_DEVICES'] = ''      # what is held equal bit for bit is so on a CPU

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / 'data'))       # last, since the standard library has a module pydoc, too

import configurator  # noqa: E402  (the line above makes it importable)
from configurator import Run, save_checkpoint  # noqa: E402
from model_gpt2 import GPT2, GPT2Config  # noqa: E402
from model_minimind import MiniMind, MiniMindConfig  # noqa: E402
from train_tokenizer import Tokenizer, byte_level_bpe, load_tokenizer, train_bpe  # noqa: E402

# the models of the tests are so small that a second thread would only wait
ONE_THREAD = {**os.environ, 'OMP_NUM_THREADS': '1'}
torch.set_num_threads(1)

TEXT = """The licence of a lighthouse keeper is renewed each spring, when the keeper reads the rules aloud.
Read the rules of the light: never let it go out, never let it go unseen, never ask the sea for a favour.
A keeper who asks the sea for a favour is given one, and the next keeper reads the rules of the light alone.
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """script('sample.py', '--seed=1') runs it in an empty folder; what it printed is .stdout and .stderr.

    code   the exit code it must have. Code 2, a user's mistake, must come with one line on stderr.
    It runs in this process, which saves the seconds that importing torch takes, and lets a test replace what
    the script imports. A copy in another folder, which has its own modules beside it, runs in a process of
    its own, and so does a script with one of these:
    input  bytes or text for standard input;  torchrun  number of ranks;  env  of the process
    restarts  how often torchrun may start them anew;  process  True, where none of these is needed
    """
    def run(name, *args, code=0, input=None, torchrun=0, restarts=0, env=(), process=False):
        arguments = [str(ROOT / name), *map(str, args)]
        if (ROOT / name).is_relative_to(ROOT) and input is None and not (torchrun or env or process):
            monkeypatch.chdir(tmp_path)
            done = run_here(arguments)
        else:
            ranks = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={torchrun}',
                     f'--max-restarts={restarts}'] if torchrun else []
            data = input.encode() if isinstance(input, str) else input
            done = subprocess.run([sys.executable, *ranks, *arguments], cwd=tmp_path, input=data, timeout=300,
                                  capture_output=True, env={**ONE_THREAD, **dict(env)})
            done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
        assert done.returncode == code, f"{name} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        assert 'Traceback' not in done.stderr or restarts       # the ranks that lost one print theirs
        assert f" is in {ROOT / 'out'}" not in done.stdout, 'a test without --out_dir writes over a real run'
        if code == 2:
            assert len(done.stderr.splitlines()) == 1, done.stderr
        return done
    return run


def run_here(arguments):
    """Run a script in this process as `python SCRIPT ...` would, and put back what it changes."""
    out, err = (io.TextIOWrapper(io.BytesIO(), 'utf-8', write_through=True) for _ in range(2))
    before = sys.argv, sys.excepthook
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    code, sys.argv = 0, arguments
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(arguments[0], run_name='__main__')
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv, sys.excepthook = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    stdout, stderr = (stream.buffer.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess(arguments, code, stdout, stderr)


def data_script(name):
    """The module data/NAME.py, by its path: the standard library has a module pydoc, too."""
    spec = importlib.util.spec_from_file_location(f'data_{name}', ROOT / 'data' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(model, cache, pieces, recorded=False):
    """The logits of texts that are read piece by piece; recorded: as a GPU's recorded step sees the cache."""
    logits = []
    for piece in pieces:
        logits.append(model(piece, cache=cache)[0])
        cache.length = torch.tensor(cache.length) if recorded and not logits[1:] else cache.length
    return torch.cat(logits, dim=1)


@pytest.fixture(scope='session')
def tokenizer():
    """A byte-level BPE tokenizer of 350 tokens with the three special ones, trained on TEXT."""
    return Tokenizer(train_bpe([TEXT] * 5, 350))


@pytest.fixture(scope='session')
def tokenizer_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizer')
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope='session')
def byte_tokenizer():
    """A tokenizer of the 256 bytes and <|endoftext|>: like GPT-2's it has no tokens of ChatML."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return Tokenizer(byte_level_bpe({byte: i for i, byte in enumerate(alphabet)}, [], ['<|endoftext|>']))


@pytest.fixture
def tiny_run(tmp_path, tokenizer, byte_tokenizer):
    """tiny_run('minimind') or tiny_run('gpt2') writes the folder of a run with random weights: what a stage
    starts from. GPT-2 has the byte tokenizer, so conversations take the Alpaca layout."""
    def make(kind):
        folder = tmp_path / f'tiny_{kind}'
        its_tokenizer = byte_tokenizer if kind == 'gpt2' else tokenizer
        torch.manual_seed(0)
        if kind == 'gpt2':
            model = GPT2(GPT2Config(
                vocab_size=its_tokenizer.vocab_size, n_positions=256, n_embd=64, n_layer=2, n_head=4))
        else:
            model = MiniMind(MiniMindConfig(
                vocab_size=its_tokenizer.vocab_size, hidden_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256))
        folder.mkdir(exist_ok=True)
        save_checkpoint(Run(torch.device('cpu'), torch.float32, 0, 1), folder, its_tokenizer, model.config,
                        step=0, settings={}, model=model.state_dict())
        return folder
    return make


@pytest.fixture
def run_folder(tiny_run):
    return tiny_run('minimind')


@pytest.fixture(scope='session')
def shared():
    """shared('data/the-verdict.txt') is the path of a file of the tutorial; without it the test is skipped.

    TUTORIAL_FILES names the folder that holds data/ and tiktoken/; by default shared/ beside the repository.
    """
    def find(name):
        path = Path(os.environ.get('TUTORIAL_FILES', ROOT.parent / 'shared')) / name
        if not path.exists():
            pytest.skip(f"{name} is not here: set TUTORIAL_FILES to a folder that has it")
        return path
    return find


@pytest.fixture(scope='session')
def gpt2(shared):
    """GPT-2's own tokenizer, where tiktoken has it on disk."""
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(shared('tiktoken')))
    return load_tokenizer('gpt2')


@pytest.fixture
def no_matplotlib(monkeypatch):
    """As where it is not installed, and that is not said yet."""
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    has_matplotlib = functools.cache(configurator.has_matplotlib.__wrapped__)
    monkeypatch.setattr(configurator, 'has_matplotlib', has_matplotlib)


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


def numbers(pattern, text):
    """All numbers that stand where the pattern has (...), as floats: numbers('loss (.+?) ', output)."""
    return [float(n.replace(',', '')) for n in re.findall(pattern, text)]
