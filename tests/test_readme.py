"""The READMEs: no command in them is misspelt, and for each a road or a test has its script and its options,
though not always together, or it is said here why none has.

    python tests/test_readme.py         # prints each command with what runs it
"""
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ONE_THREAD

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import LOOP, NAMES, settings_in  # noqa: E402  (the line above makes it importable)

PROGRAMS = ('python', 'torchrun', 'bash', 'pip', 'npm', 'hf', 'vllm', 'ollama', 'cd')
# what stands in no test and in no road, and why
ELSEWHERE = {
    'pip': "what .ci/run does, but for optional packages", 'npm': "needs the network", 'hf': "so does it",
    'cd': "npm's",
    'vllm': "a server of its own: the table below the command was measured by hand",
    'ollama': "was not at hand, and the README says so",
    'python -m pytest': ".ci/run", 'python -m pytest tests/test_layouts.py': "wants a clone of MiniMind",
    'python -c "import torch; print(torch.version.cuda)"': "nothing of ours",
    'torchrun --max-restarts=3': "a part of a command: tests/test_training.py restarts ranks"}


def commands():
    """{command: the README it stands in}, of blocks of code and of code within a line."""
    found = {}
    for path in sorted(ROOT.glob('README*.md')):
        text = path.read_text()
        blocks = re.findall(r'^```\n(.*?)^```', text, re.M | re.S)
        inline = re.findall(r'`([^`\n]+)`', re.sub(r'^```.*?^```', '', text, flags=re.M | re.S))
        for line in [*'\n'.join(blocks).splitlines(), *inline]:
            for part in re.split(r' && ', re.sub(r'\s+#.*', '', line)):
                words = part.split()
                while words and re.fullmatch('[A-Z_]+=.*', words[0]):       # STEPS=4 bash ...
                    words.pop(0)
                if words and words[0] in PROGRAMS and len(words) > 1:
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


def runs(command):
    """What runs a command: a road or a test that has its script and all of its options; None: nothing."""
    script, options = script_and_options(command)
    if command in ELSEWHERE or not script:
        return ELSEWHERE.get(command, ELSEWHERE.get(command.split()[0]))
    text = (ROOT / script).read_text()
    for option in options:
        assert option in {*settings_in(ROOT / script), *LOOP, *NAMES} or f'--{option}' in text, \
            f"{command}: {script} has no --{option}"
    for path in [ROOT / 'tests' / 'road.sh', *sorted((ROOT / 'tests').glob('test_*.py'))]:
        text = path.read_text()
        if path != Path(__file__).resolve() and re.search(rf'\b{Path(script).stem}\b', text) and all(
                re.search(rf'--{option}\b', text) for option in options):
            return f'tests/{path.name}'
    return None


def test_every_command_is_run_by_something():
    found = commands()
    assert len(found) > 40
    assert not [f"{name}: {command}" for command, name in found.items() if not runs(command)]


@pytest.mark.parametrize('command', ['python sample.py --no_such=1', 'python tests/road.sh --poems=2'])
def test_a_misspelt_option_is_found(command):
    with pytest.raises(AssertionError, match='has no --'):
        runs(command)


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
    """In a copy of what is committed, whose folder has a name with a space and Chinese letters."""
    copy, path = tmp_path / '路 one', f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for pattern in '*.py', 'config/*', 'data/*.*', 'tests/road.sh':
        for file in filter(Path.is_file, ROOT.glob(pattern)):
            (copy / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy / file.relative_to(ROOT))
    env = {**ONE_THREAD, 'STEPS': '2', 'PATH': path}
    done = subprocess.run(['bash', 'tests/road.sh'], cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = (copy / 'out' / 'road.md').read_text().splitlines()[2:]
    assert [re.search('`python (.*?)`', row)[1] for row in rows] == [
        'pretrain.py', 'finetune_cls.py', 'sft.py', 'dpo.py', 'lora.py', 'distill.py',
        'distill.py config/reason.py']
    assert all(re.search(r'\| \d+\.\d{3} \| \d+\.\d{3} \|', row) for row in rows)


if __name__ == '__main__':
    for command in commands():
        print(f"{command}\n    {runs(command) or 'NOTHING'}")
