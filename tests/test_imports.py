"""The files import each other in one direction, the order of reading: what DESIGN calls a tree."""
import ast
import re

import pytest
from conftest import ROOT

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


def test_scripts_of_data_import_nothing_of_ours():
    scripts = list((ROOT / 'data').glob('*.py'))
    assert scripts and not any(set(imports(path)) & set(ORDER) for path in scripts)


def test_the_readme_lists_the_files_in_this_order():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| `(\w+)\.py` \|', text, re.MULTILINE)
    assert rows == ORDER
