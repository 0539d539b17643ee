"""The whole road, each stage from what the one before it left, from a folder that is not the repository.

The models are tiny and the steps are few. What is tested is that every hand-over fits, on the built-in data.
"""
import json

SMALL = ['--max_iters=2', '--eval_interval=2', '--batch_size=2', '--block_size=128', '--dtype=float32',
         '--device=cpu', '--seed=1']
SHAPE = ['--n_layer=1', '--n_head=2', '--n_kv_head=1', '--n_embd=32']
REPORT = ['--eval_iters=1', '--report_size=2', '--max_new_tokens=4']


def test_the_road_from_nothing_to_every_stage(script, tmp_path):
    # nothing is prepared: pretrain.py trains the tokenizer and tokenises pydoc itself
    done = script('pretrain.py', *SMALL, *SHAPE, '--eval_iters=1', '--tokenizer=words', '--dataset=./pydoc',
                  '--out_dir=pretrain')
    assert 'train_tokenizer.py' in done.stdout and 'prepare.py' in done.stdout
    assert (tmp_path / 'words' / 'tokenizer.json').exists() and (tmp_path / 'pydoc' / 'meta.json').exists()
    script('sample.py', '--out_dir=pretrain', '--start=def is_', '--max_new_tokens=5')

    script('sft.py', *SMALL, *REPORT, '--init_from=pretrain', '--dataset=./pydoc_sft', '--out_dir=sft')
    script('dpo.py', *SMALL, '--eval_iters=1', '--init_from=sft', '--dataset=./pydoc_dpo', '--out_dir=dpo')
    script('lora.py', *SMALL, *REPORT, '--init_from=dpo', '--dataset=./reason', '--out_dir=lora')
    script('distill.py', *SMALL, *REPORT, *SHAPE, '--teacher=sft', '--dataset=./pydoc_sft',
           '--out_dir=distill')
    script('finetune_cls.py', *SMALL, '--init_from=pretrain', '--dataset=./spam', '--out_dir=spam_run')
    out = script('finetune_cls.py', '--out_dir=spam_run', '--classify=You won a prize').stdout
    assert out.split('\t')[0] in ('ham', 'spam')

    # every folder speaks, is a log of what happened, and leaves for Hugging Face
    for folder in ('sft', 'dpo', 'lora', 'distill'):
        script('sample.py', f'--out_dir={folder}', '--chat', '--max_new_tokens=3', input='What is a list?\n')
        lines = [json.loads(line) for line in (tmp_path / folder / 'metrics.jsonl').read_text().splitlines()]
        assert {line['step'] for line in lines} == {0, 1, 2}
    script('sample.py', '--out_dir=dpo', '--export_dir=hf')
    ours = script('sample.py', '--out_dir=dpo', '--temperature=0', '--max_new_tokens=5').stdout
    assert script('sample.py', '--init_from=hf', '--temperature=0', '--max_new_tokens=5').stdout == ours
