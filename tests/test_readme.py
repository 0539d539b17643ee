"""The READMEs: no command in them is misspelt, and each runs as it is printed, or it is said here why not.

    python tests/test_readme.py             # in a copy, one after the other, with fewer steps where it trains

CI calls this too: a quarter of an hour on two cores.
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ONE_THREAD, TEXT

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import LOOP, NAMES, settings_in  # noqa: E402  (the line above makes it importable)
from train_tokenizer import Tokenizer, train_bpe  # noqa: E402

PROGRAMS = ('python', 'torchrun', 'bash', 'pip', 'npm', 'hf', 'vllm', 'ollama', 'cd', 'git', 'mkdir',
            'MINIMIND=CLONE')
# what is not run, and why, by how it begins
ELSEWHERE = {
    'pip': ".ci/run installs", 'npm': "needs the network", 'hf': "needs the network", 'cd': "npm's",
    'git': "needs the network", 'mkdir': "npm's",
    'bash tests/road.sh poems': "wants the archive: half an hour, walked by hand",
    'python sample.py --out_dir=out/poems': "so does this",
    'python data/poems.py': "tests/test_poems.py has an archive of its own",
    'python sample.py --init_from=smol': "tests/test_smollm2.py",
    'python tests/fuzz.py': "tests/test_opening.py, a tenth as long",
    'python tests/gpu.py': "wants a GPU; tests/test_bench.py takes it through on a CPU",
    'python tests/kill.py': "three minutes, by hand; tests/test_pretrain.py kills one run",
    'vllm': "a server of its own: the table below it was measured by hand",
    'ollama': "was not at hand, and the README says so",
    'python -m pytest': ".ci/run", 'MINIMIND=CLONE': "wants a clone of MiniMind",
    'torchrun --nnodes': "wants two machines",
    'torchrun --max-restarts': "a part of a command: tests/test_training.py restarts ranks",
    'python pretrain.py config/gpt2_124m.py': "downloads GPT-2's tokenizer",
    'torchrun --nproc_per_node=8 pretrain.py config/gpt2_124m.py': "so does this",
    'python prepare.py --input=nanoGPT': "and this",
    'python pretrain.py config/verdict.py': "downloads the story", 'python data/download.py': "downloads",
    'python pretrain.py config/shakespeare_char.py': "downloads the plays"}
# fewer steps, of the settings that a script has
LESS = dict(max_iters=2, eval_interval=2, eval_iters=1, epochs=0, batch_size=2, report_size=2,
            max_new_tokens=8)


def commands():
    """{command: the README it stands in}, of blocks of code and of code within a line."""
    found = {}
    for path in sorted(ROOT.glob('README*.md')):
        text = path.read_text()
        for kind, block, inline in re.findall(r'^```(\w*)\n(.*?)^```|`([^`]+)`', text, re.M | re.S):
            lines = inline.replace('\n', ' ') if inline else '' if kind else block
            for part in re.split(r' && |\n', re.sub(r'\s+#.*', '', lines)):
                words = part.split()
                if words and words[0].startswith('STEPS='):                 # STEPS=4 bash ...
                    words.pop(0)
                if len(words) > 1 and words[0] in PROGRAMS:
                    found.setdefault(' '.join(words), path.name)
    return found


def script_and_options(command):
    """('sample.py', ['chat', ...]) of `python sample.py --chat`; ('', []) where no file of ours is run."""
    words = shlex.split(command, posix=True)
    scripts = [word for word in words if word.endswith(('.py', '.sh')) and (ROOT / word).is_file()]
    if words[0] not in ('python', 'torchrun', 'bash') or not scripts:
        return '', []
    after = words[words.index(scripts[0]) + 1:]
    return scripts[0], [word[2:].split('=')[0].replace('-', '_') for word in after if word.startswith('--')]


def check_options(command):
    """An AssertionError where a script of ours has no such option."""
    script, options = script_and_options(command)
    for option in options:
        known = {*settings_in(ROOT / script), *LOOP, *NAMES}
        assert option in known or f'--{option}' in (ROOT / script).read_text(), \
            f"{command}: {script} has no --{option}"


def not_run(command):
    """Why a command is not run; '' where it is."""
    return next((why for start, why in ELSEWHERE.items() if command.startswith(start)), '')


def shortened(command):
    """The command with fewer steps, where it trains, and shorter texts."""
    script, _ = script_and_options(command)
    less = {key: value for key, value in LESS.items() if key in settings_in(ROOT / script)} if script else {}
    if re.search('--(to_peft|from_peft|export_)', command):
        less = {}
    return ' '.join([command, *(f'--{key}={value}' for key, value in less.items())])


def copy_of_the_project(folder):
    """What is committed, in a folder whose name has a space and Chinese letters, and what the READMEs take to
    be there: texts, conversations, a config file of nanoGPT, MiniMind's tokenizer."""
    copy = folder / '路 one'
    for pattern in '*.py', 'requirements*', 'config/*', 'data/*.*', 'tests/*':
        for file in filter(Path.is_file, ROOT.glob(pattern)):
            (copy / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy / file.relative_to(ROOT))
    (copy / 'novel.txt').write_text(TEXT * 40)
    texts = [dict(text=f"{i}. {TEXT}") for i in range(100)]
    chats = [dict(conversations=[dict(role='user', content=f"Who keeps light {i}?"),
                                 dict(role='assistant', content=f"Keeper {i}.")]) for i in range(100)]
    for name, records in dict(pretrain_t2t_mini=texts, sft_t2t_mini=chats, chats=chats).items():
        (copy / f'{name}.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    (copy / 'THEIR_FILE.py').write_text("out_dir = 'out-theirs'\ndataset = 'novel'\nlr_decay_iters = 9\n"
                                        "n_layer = 1\nn_head = 2\nn_embd = 32\nblock_size = 64\n")
    Tokenizer(train_bpe([TEXT] * 5, 350)).save(copy / 'minimind' / 'model')
    return copy


def run_in(copy, command, env=os.environ, **how):
    env = {**env, 'STEPS': '2', 'PATH': f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, **how)


def test_no_option_is_misspelt():
    assert len(commands()) > 60
    for command in commands():
        check_options(command)


def test_what_is_not_run_stands_in_a_readme():
    assert not [start for start in ELSEWHERE if not any(c.startswith(start) for c in commands())]


@pytest.mark.parametrize('command', ['python sample.py --no_such=1', 'python tests/road.sh --poems=2'])
def test_a_misspelt_option_is_found(command):
    with pytest.raises(AssertionError, match='has no --'):
        check_options(command)


def test_files_that_are_named_exist():
    """In READMEs: those of this project, by their path."""
    for path in ROOT.glob('README*.md'):
        for name in re.findall(r'`((?:config|data|tests)/[\w./]+\.(?:py|sh|md|csv))', path.read_text()):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_both_readmes_have_the_same_sections():
    english, chinese = (re.findall(r'^## ', (ROOT / name).read_text(), re.M)
                        for name in ('README.md', 'README.zh-CN.md'))
    assert len(chinese) >= len(english)


def test_the_road_is_walked_by_one_command(tmp_path):
    copy = copy_of_the_project(tmp_path)
    done = run_in(copy, ['bash', 'tests/road.sh'], ONE_THREAD)
    assert done.returncode == 0, done.stderr
    rows = (copy / 'out' / 'road.md').read_text().splitlines()[2:]
    assert [re.search('`python (.*?)`', row)[1] for row in rows] == [
        'pretrain.py', 'finetune_cls.py', 'sft.py', 'dpo.py', 'lora.py', 'distill.py',
        'distill.py config/reason.py']
    assert all(re.search(r'\| \d+\.\d{3} \| \d+\.\d{3} \|', row) for row in rows)


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as folder:
        copy, failed = copy_of_the_project(Path(folder)), 0
        prepare = 'python prepare.py --input=novel.txt --dataset=mytext --tokenizer=minimind/model'
        run_in(copy, prepare, shell=True, check=True)
        for command, name in commands().items():
            if why := not_run(command):
                print(f"{command}\n    not run: {why}")
                continue
            began = time.time()
            done = run_in(copy, shortened(command), shell=True, input="Who keeps the light?\n")
            print(f"{shortened(command)}\n    {time.time() - began:.0f} s", flush=True)
            if done.returncode or 'Traceback' in done.stderr:
                failed += 1
                print(f"{name}: ended with {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
    sys.exit(f"{failed} of {len(commands())} commands failed" if failed else 0)
