"""The files import each other in one direction, the order of reading: what DESIGN calls a tree."""
import ast
import re
import sys

import pytest
from conftest import ROOT

from configurator import settings_in

ORDER = ['configurator', 'train_tokenizer', 'prepare', 'model_gpt2', 'model_minimind', 'sample', 'pretrain',
         'finetune_cls', 'sft', 'dpo', 'lora', 'distill']


def imports(path):
    """{module: names} of all that a file imports, at any depth."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found.update({alias.name: set() for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return found


def test_the_scripts_are_those_of_the_design():
    assert sorted(path.stem for path in ROOT.glob('*.py')) == sorted(ORDER)


@pytest.mark.parametrize('name', ORDER)
def test_a_file_imports_only_what_is_read_before_it(name):
    ours = set(imports(ROOT / f'{name}.py')) & set(ORDER)
    assert ours <= set(ORDER[:ORDER.index(name)])


@pytest.mark.parametrize('name', ['model_gpt2', 'model_minimind'])
def test_a_model_can_be_copied_out_with_its_reader_of_weights(name):
    found = imports(ROOT / f'{name}.py')
    assert set(found) & set(ORDER) == {'configurator'}
    assert found['configurator'] - {'read_file'} == {'build_model', 'check_sizes', 'read_json',
                                                     'read_weights', 'write_model'}


def test_scripts_of_data_import_nothing_of_ours_and_need_no_torch():
    scripts = list((ROOT / 'data').glob('*.py'))
    needed = {name.partition('.')[0] for path in scripts for name in imports(path)}
    assert scripts and needed <= {*sys.stdlib_module_names, *(path.stem for path in scripts), 'zhconv'}


# ---- before torch is loaded ----

STAGES = [name for name in ORDER[1:] if 'configure(' in (ROOT / f'{name}.py').read_text(encoding='utf-8')]


@pytest.fixture
def torchless(script, tmp_path):
    """Run a script where Ctrl-C comes as soon as it imports what is not the standard library's."""
    for name in ('torch', 'numpy', 'tokenizers', 'tiktoken'):
        (tmp_path / f'{name}.py').write_text('raise KeyboardInterrupt')
    return lambda name, *args, code=0: script(name, *args, code=code, env=dict(PYTHONPATH=str(tmp_path)))


@pytest.mark.parametrize('name', STAGES)
def test_help_needs_no_torch_and_is_that_of_configure(script, torchless, name):
    assert torchless(f'{name}.py', '--help').stdout == script(f'{name}.py', '--help').stdout


@pytest.mark.parametrize('name', STAGES)
def test_a_misspelt_setting_is_refused_before_torch(torchless, name):
    line = torchless(f'{name}.py', '--on_eror=skip', code=2).stderr
    assert line.startswith(f"{name}.py: --on_eror=skip: unknown setting 'on_eror'")


def test_an_illegal_value_is_refused_before_torch(torchless, tmp_path):
    assert 'at least 1' in torchless('pretrain.py', '--batch_size', '0', code=2).stderr
    (tmp_path / 'mine.py').write_text("batch_size = 'x'\n")
    assert 'mine.py:1: batch_size takes a whole number' in torchless('sft.py', 'mine.py', code=2).stderr


def test_ctrl_c_while_modules_load_is_one_line_and_nothing_is_told_twice(torchless):
    done = torchless('pretrain.py', '--num_workers=4', code=130)        # which changes nothing, and says so
    assert (done.stdout, done.stderr.strip()) == ('', 'interrupted')


def test_a_setting_that_is_computed_waits_for_configure(tmp_path):
    path, end = tmp_path / 'mine.py', 'configure(globals())\n'
    for block, found in [('rows = 16\nN = []\n', ['rows']), ('rows = 4 * 4\n', []), ('a, b = 1, 2\n', [])]:
        path.write_text(block + end)
        assert [key for key in settings_in(path) if key[0] != '_'] == found
    path.write_text('rows = 16\n')
    assert settings_in(path) == settings_in('') == {}           # of another program, and of none


def test_the_readme_lists_the_files_in_this_order():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| `(\w+)\.py` \|', text, re.MULTILINE)
    assert rows == ORDER
