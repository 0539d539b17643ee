"""sample.py: each way of decoding against transformers, batches, overflow, streaming, and its mistakes."""
import copy
import sys

import pytest
import tokenizers
import torch
from conftest import TEXT, numbers
from torch import nn

from configurator import has_compiler
from model_gpt2 import GPT2, GPT2Config
from model_minimind import MiniMind, MiniMindConfig
from sample import (Int8Linear, PackedLinear, Stream, candidates, choose, compile_blocks, distribution,
                    draw_token, for_decoding, generate, left_pad, penalize)
from train_tokenizer import Tokenizer

CONTEXT = 48


def random_model(kind, vocab_size=211):
    if kind == 'gpt2':
        model = GPT2(GPT2Config(vocab_size, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4))
    else:
        model = MiniMind(MiniMindConfig(vocab_size, max_position_embeddings=CONTEXT, hidden_size=32,
                                        num_hidden_layers=2, num_attention_heads=4))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.fixture(params=['gpt2', 'minimind'])
def model(request):
    return random_model(request.param)


@pytest.fixture(scope='module')
def hf(tokenizer, tmp_path_factory):
    """A Hugging Face folder: a model of random weights, with more ids than its tokenizer has."""
    folder = tmp_path_factory.mktemp('hf')
    torch.manual_seed(0)
    random_model('gpt2', 448).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


# ---- the choice ----

@pytest.mark.parametrize('how', [
    dict(temperature=0.3), dict(top_k=1), dict(top_k=7), dict(top_k=10_000), dict(top_p=0.0), dict(top_p=0.6),
    dict(min_p=0.2), dict(temperature=1.7, top_k=30, top_p=0.8, min_p=0.05)])
def test_distributions_are_those_of_transformers(how):
    process = pytest.importorskip('transformers').generation.logits_process
    logits = 3 * torch.randn(5, 100)
    expected = logits / how.get('temperature', 1)
    for name, warper in (('top_k', process.TopKLogitsWarper), ('top_p', process.TopPLogitsWarper),
                         ('min_p', process.MinPLogitsWarper)):
        if how.get(name) is not None:
            expected = warper(how[name])(None, expected)
    torch.testing.assert_close(distribution(logits, **how), expected.softmax(-1), atol=1e-6, rtol=1e-5)


def test_equal_probabilities_leave_one_token_where_top_p_is_0():
    assert distribution(torch.zeros(2, 3), top_p=0.0).sum(dim=-1).tolist() == [1, 1]


def test_tokens_are_drawn_as_often_as_their_probability_says(monkeypatch):
    p = torch.tensor([[0.0, 0.7, 0.0, 0.3, 0.0]])
    counts = draw_token(p.expand(40_000, 5), torch.Generator().manual_seed(0)).bincount(minlength=5)
    torch.testing.assert_close(counts / 40_000, p[0], atol=0.01, rtol=0)
    for number, token in ((0.0, 1), (1 - 2**-24, 3)):           # the least and the largest there are
        monkeypatch.setattr(torch, 'rand', lambda *size, number=number, **_: torch.full(size, number))
        p = p / p.sum() * torch.tensor([[1 + 2**-23]])          # sums of probabilities are not always 1
        assert draw_token(p).tolist() == [token]


def test_the_repetition_penalty_is_that_of_transformers():
    process = pytest.importorskip('transformers').generation.logits_process
    logits, seen = torch.randn(3, 50), torch.randint(50, (3, 20))
    expected = process.RepetitionPenaltyLogitsProcessor(1.3)(seen, logits.clone())
    torch.testing.assert_close(penalize(logits, seen, 1.3), expected)
    assert torch.equal(choose(logits, seen, temperature=0, repetition_penalty=1.3), expected.argmax(-1))


@pytest.mark.parametrize('temperature', [0, 1e-300, 1e-9, 1e-4, 1.0, 1e30])
def test_no_temperature_breaks_it(temperature):
    logits = torch.tensor([[1e4, -1e4, 0.0], [3.0, 1.0, 2.0]])
    tokens = torch.cat([choose(logits, temperature=temperature) for _ in range(50)])
    assert set(tokens.tolist()) <= {0, 1, 2}
    if temperature < 1e-3:
        assert set(tokens.tolist()) == {0}


@pytest.mark.parametrize('temperature', [0, 1.0])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_logits_that_are_no_numbers_end_in_a_line(temperature, value, capsys):
    with pytest.raises(SystemExit) as end:
        choose(torch.tensor([[1.0, 2.0], [value, 1.0]]), temperature=temperature)
    assert end.value.code == 1 and 'not finite' in capsys.readouterr().err


def test_candidates_name_the_filter_that_removed_them():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]).log()[None]
    table = candidates(logits, torch.tensor([[0]]), n=4, temperature=1.0, top_k=4, top_p=0.65, min_p=0.8)
    assert [(row[0], row[3]) for row in table] == [(0, ''), (1, 'min_p'), (2, 'top_p'), (3, 'top_p')]
    assert [before for _, before, _, _ in table] == pytest.approx([0.4, 0.3, 0.2, 0.06])
    assert [after for _, _, after, _ in table] == pytest.approx([1, 0, 0, 0])
    assert candidates(logits, torch.tensor([[0]]), n=9, top_k=2)[2][3] == 'top_k'
    assert [row[0] for row in candidates(logits, torch.tensor([[0]]), n=1, also=[2])][1:] == [2]
    cold = candidates(1000 * logits, torch.tensor([[0]]), n=9, top_k=0)     # what underflows nobody removed
    assert not any(removed_by for *_, removed_by in cold)


# ---- generating ----

def uncached(model, row, n, context=CONTEXT):
    """Greedy decoding as chapter I-4 does it: read everything for each token."""
    row = list(row)
    for _ in range(n):
        with torch.no_grad():
            row.append(model(torch.tensor([row]))[0][0, -1].argmax().item())
    return row[-n:]


def test_greedy_is_what_reading_everything_again_gives(model):
    tokens = torch.randint(211, (2, 9))
    new = torch.stack(list(generate(model, tokens, 20, temperature=0)), dim=1)
    assert new.tolist() == [uncached(model, row, 20) for row in tokens.tolist()]


def test_prompts_of_different_length_go_on_as_each_would_alone(model):
    prompts = [torch.randint(211, (n,)).tolist() for n in (1, 5, 17)]
    for how in (dict(), dict(repetition_penalty=1.5)):
        tokens, padding = left_pad(prompts)
        how = dict(temperature=0, **how)
        together = torch.stack(list(generate(model, tokens, 20, padding=padding, **how)), dim=1)
        alone = [[new.item() for new in generate(model, torch.tensor([ids]), 20, **how)] for ids in prompts]
        assert together.tolist() == alone


def test_a_full_context_stops_or_slides(model):
    tokens = torch.randint(211, (2, 10))
    stopped = torch.stack(list(generate(model, tokens, 200, temperature=0)), dim=1)
    assert stopped.shape == (2, CONTEXT + 1 - 10)               # the last token is not read any more
    how = dict(temperature=0, on_full='slide')
    slid = torch.stack(list(generate(model, tokens, 200, **how)), dim=1)
    assert slid.shape == (2, 200) and torch.equal(slid[:, :39], stopped)
    # it goes on from the later half of the context
    half = torch.cat([tokens, stopped], dim=1)[:, -CONTEXT // 2:]
    assert slid[:, 39:60].tolist() == [uncached(model, row, 21) for row in half.tolist()]
    again = torch.stack(list(generate(model, tokens, 200, use_cache=False, **how)), dim=1)
    assert torch.equal(slid, again)
    # a prompt beyond the context, and rows of which one is short
    long, padding = left_pad([torch.randint(211, (3 * CONTEXT,)).tolist(), [5, 6]])
    assert len(list(generate(model, long, 70, padding=padding, on_full='slide'))) == 70
    assert list(generate(model, long, 70, padding=padding)) == []


def test_ids_beyond_the_tokenizer_are_never_chosen(model):
    tokens = torch.zeros(64, 1, dtype=torch.long)
    for how in (dict(temperature=0), dict(temperature=100.0), dict(temperature=100.0, top_k=200, top_p=0.99)):
        new = torch.stack(list(generate(model, tokens, 20, vocab_size=100, **how)), dim=1)
        assert new.max() < 100
    assert torch.stack(list(generate(model, tokens, 20, temperature=100.0))).max() >= 100


def test_a_row_ends_at_a_stop_id_and_the_batch_when_all_have(model):
    tokens = torch.randint(211, (4, 6))
    free = torch.stack(list(generate(model, tokens, 30, temperature=0)), dim=1)
    stop = {free[row, 2 + row].item() for row in range(4)}
    new = torch.stack(list(generate(model, tokens, 30, stop, temperature=0)), dim=1)
    ends = [next(i for i, token in enumerate(row) if token in stop) for row in free.tolist()]
    assert new.shape[1] == max(ends) + 1
    for row, end in enumerate(ends):
        assert new[row, :end + 1].tolist() == free[row, :end + 1].tolist()
        assert set(new[row, end:].tolist()) == {free[row, end].item()}


def test_the_seed_decides(model):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return [new.item() for new in generate(model, torch.tensor([[3]]), 30, generator=generator)]
    assert draw(1) == draw(1) != draw(2)


def test_the_head_is_asked_only_where_a_token_is_chosen(model):
    shapes = []
    model.lm_head.register_forward_pre_hook(lambda layer, given: shapes.append(tuple(given[0].shape)))
    list(generate(model, torch.randint(211, (3, 9)), 4, temperature=0))
    assert shapes == [(3, 32)] * 4


# ---- decoding on a CPU ----

@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('shape', [(1, 1, 512), (16, 1, 512), (3, 40, 512), (2, 1, 500)])
def test_packed_and_int8_layers_compute_the_product(shape, bias):
    layer, x = torch.nn.Linear(shape[-1], 383, bias), torch.randn(shape)
    expected = layer(x)
    with torch.no_grad():
        if torch.backends.mkldnn.is_available():
            torch.testing.assert_close(PackedLinear(layer)(x), expected, atol=1e-5, rtol=1e-5)
        y = Int8Linear(layer).bfloat16()(x.bfloat16())
    assert y.shape == expected.shape and y.dtype == torch.bfloat16
    # 127 steps over uniform weights: an error of 1 / (254 sqrt(3)) x sqrt(3) = 0.4%, and bfloat16 rounds 0.4%
    assert (y - expected).norm() < 0.01 * expected.norm()


def test_a_model_made_for_decoding_answers_as_before(model):
    tokens = torch.randint(211, (3, 9))
    expected = torch.stack(list(generate(model, tokens, 30, temperature=0)))
    with torch.no_grad():
        logits = model(tokens)[0]
        names = [*model.state_dict()]
        quantised = for_decoding(copy.deepcopy(model), torch.bfloat16, int8=True)
        assert isinstance(quantised.lm_head, Int8Linear)
        error = quantised(tokens)[0] - logits
    assert error.norm() < 0.05 * logits.norm() and quantised.make_cache(1, 8).keys[0].dtype == torch.bfloat16
    assert len(list(generate(quantised, tokens, 30, temperature=0))) == 30
    packed = for_decoding(copy.deepcopy(model), torch.float32)
    assert torch.equal(torch.stack(list(generate(packed, tokens, 30, temperature=0))), expected)
    assert [*model.state_dict()] == names


@pytest.mark.parametrize('dtype, int8', [(torch.float32, False), (torch.bfloat16, True)])
def test_compiled_blocks_answer_as_before_by_few_graphs(model, monkeypatch, dtype, int8):
    """Those of a prompt and of a new token, each again when it has met another length: not one for each layer
    and token."""
    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    graphs, compile = [], nn.Module.compile
    monkeypatch.setattr(nn.Module, 'compile', lambda self: compile(self, backend=count))
    torch.compiler.reset()
    model = for_decoding(copy.deepcopy(model), dtype, int8)
    tokens = [torch.randint(211, (2, n)) for n in (9, 12, 5)]
    expected, compiled = [], []
    for found in (expected, compiled):
        for prompt in tokens:
            found.append(torch.stack(list(generate(model, prompt, 20, temperature=0))))
        compile_blocks(model)
    assert all(map(torch.equal, expected, compiled)) and len(graphs) <= 5


def test_the_script_decodes_compiled(script, tiny_run):
    how = [f"--out_dir={tiny_run('minimind')}", '--temperature=0', '--max_new_tokens=9', '--dtype=float32']
    where = dict(env={'PATH': '', 'CXX': ''}, code=2)
    assert 'needs a C++ compiler' in script('sample.py', *how, '--compile', **where).stderr
    if not has_compiler():
        pytest.skip("no C++ compiler here")
    compiled, eager = (script('sample.py', '--device=cpu', *how, *more, process=True).stdout
                       for more in (['--compile'], []))
    assert compiled == eager


def test_routers_and_experts_stay_as_they_are():
    model = MiniMind(MiniMindConfig(211, max_position_embeddings=CONTEXT, hidden_size=32, num_hidden_layers=2,
                                    num_attention_heads=4, use_moe=True, n_shared_experts=1)).eval()
    tokens = torch.randint(211, (2, 9))
    before, after = (torch.stack(list(generate(of, tokens, 20, temperature=0)))
                     for of in (model, for_decoding(copy.deepcopy(model), torch.float32)))
    assert torch.equal(before, after)


def test_the_script_decodes_in_int8(script, hf, tiny_run, tmp_path):
    how = ['--dtype=int8', '--device=cpu', '--temperature=0', '--max_new_tokens=20']
    for source in (f'--init_from={hf}', f"--out_dir={tiny_run('minimind')}"):
        assert script('sample.py', source, *how, process=True).stdout.startswith('def ')
    assert 'decode on a CPU' in script('sample.py', source, '--dtype=int8', '--export_dir=x', code=2).stderr
    assert "dtype='int8' is for sample.py" in script('pretrain.py', '--dtype=int8', code=2).stderr
    MiniMind(MiniMindConfig(448, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, qk_norm=True,
                            use_moe=True)).save_pretrained(tmp_path / 'moe')
    for file in ('tokenizer.json', 'tokenizer_config.json'):
        (tmp_path / 'moe' / file).write_bytes((hf / file).read_bytes())
    assert 'for dense models' in script('sample.py', '--init_from=moe', *how, code=2).stderr


# ---- text ----

def stream(tokenizer, text, stop=()):
    """What a Stream shows, token by token."""
    s = Stream(tokenizer, tokenizer.encode('The'), stop)
    return [s.add(token) for token in tokenizer.encode(text)] + ([] if s.ended else [s.finish()]), s


def test_text_is_shown_in_whole_characters(tokenizer):
    pieces, _ = stream(tokenizer, ' light 灯 é.')
    assert ''.join(pieces) == ' light 灯 é.' and not any('\ufffd' in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 3


def llama_tokenizer():
    """A tokenizer as Llama 2's, whose decoder drops a first space, and some ids: words and bytes."""
    words = ['<unk>', '</s>', *(f'<0x{i:02X}>' for i in range(256)), '\u2581', '\u2581the', '\u2581sea', 's']
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(
        {word: i for i, word in enumerate(words)}, [], unk_token='<unk>', byte_fallback=True))
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence([decoders.Replace('\u2581', ' '), decoders.ByteFallback(),
                                         decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    backend.add_special_tokens(['</s>'])
    return backend, [words.index(word) for word in ('\u2581the', '\u2581sea', 's', '\u2581', *(
        f'<0x{byte:02X}>' for byte in '灯é'.encode()), '\u2581the', '\u2581', '\u2581sea')]


def test_a_token_is_decoded_with_few_others_and_the_text_is_that_of_all(tokenizer, monkeypatch):
    backend, ids = llama_tokenizer()
    texts = [(Tokenizer(backend, words=dict(eos_token='</s>')), ids * 20),
             (tokenizer, tokenizer.encode(TEXT + '灯 é ' * 20))]
    for of, ids in texts:
        for prompt in ([], ids[:7], ids):
            s, lengths = Stream(of, prompt, ['nowhere']), []
            with monkeypatch.context() as patch:
                patch.setattr(of, 'decode', lambda given, *, to=lengths, decode=of.decode: (
                    to.append(len(given)), decode(given))[1])
                pieces = [s.add(token) for token in ids] + [s.finish()]
            assert ''.join(pieces) == s.text == of.decode([*prompt, *ids])[len(of.decode(prompt)):]
            assert max(lengths[8:]) < 20


def test_nothing_is_shown_from_a_stop_text_on(tokenizer):
    text = ' light## the ##end of it'
    for stop in ('##end', '##e|of', 'nd of', '##end of it', '|##end'):
        pieces, s = stream(tokenizer, text, stop.split('|'))
        assert s.ended and ''.join(pieces) == s.text == text[:min(text.find(t) for t in stop.split('|') if t)]
    pieces, s = stream(tokenizer, text, ['##ends', 'lighter'])      # a beginning alone is no stop text
    assert ''.join(pieces) == text
    s = Stream(tokenizer, [])
    assert s.add(tokenizer.eot) == '' and s.ended and s.add(5) == ''


# ---- the script ----

def test_the_script_on_several_prompts(script, hf, tmp_path):
    (tmp_path / 'prompts.txt').write_text('The keeper\n\nThe light of the sea, the sea\nA\n')
    how = [f'--init_from={hf}', '--temperature=0', '--max_new_tokens=12', '--dtype=float32', '--device=cpu']
    together = script('sample.py', *how, '--start=FILE:prompts.txt', '--lines').stdout.split('-' * 40 + '\n')
    alone = [script('sample.py', *how, f'--start={prompt}').stdout
             for prompt in ('The keeper', 'The light of the sea, the sea', 'A')]
    assert together == alone


def test_the_script_shows_probabilities_draws_them_and_slides(script, hf, tmp_path):
    pytest.importorskip('matplotlib')
    out = script('sample.py', f'--init_from={hf}', '--max_new_tokens=80', '--on_full=slide', '--show_probs',
                 '--top_k=3', '--plot', '--device=cpu').stdout
    assert out.count('<- chosen') == out.count('softmax') > 40 and 'removed by top_k' in out
    kept = [p for p in numbers(r'  \d\.\d{4}  +(\d\.\d{4})  ', out) if p]
    assert sum(kept) == pytest.approx(out.count('softmax'), rel=0.02)
    assert (tmp_path / 'next_token.png').read_bytes()[:4] == b'\x89PNG'


def test_a_full_context_is_said(script, hf):
    done = script('sample.py', f'--init_from={hf}', '--start=' + 'light ' * 40, '--max_new_tokens=80')
    assert 'the context of 48 tokens is full' in done.stderr
    long = '--start=' + TEXT
    assert '--on_full=slide' in script('sample.py', f'--init_from={hf}', long, code=2).stderr
    script('sample.py', f'--init_from={hf}', long, '--on_full=slide', '--max_new_tokens=60')


@pytest.mark.parametrize('args, words', [
    (['--temperature=-1'], 'temperature must be at least 0'),
    (['--temperature=inf'], 'temperature takes a number'),
    (['--top_k=-1'], 'top_k must be at least 0'),
    (['--top_k=None'], 'top_k takes a whole number'),
    (['--top_p=1.5'], 'top_p must lie between 0 and 1'),
    (['--min_p=2'], 'min_p must lie between 0 and 1'),
    (['--repetition_penalty=0'], 'repetition_penalty must lie between'),
    (['--max_new_tokens=0'], 'max_new_tokens must be at least 1'),
    (['--on_full=slid'], "did you mean 'slide'"),
    (['--start=FILE:nowhere'], 'No such file'),
    (['--start=', '--lines'], 'no line with text'),
    (['--start=a\nb', '--lines', '--show_probs'], 'one prompt'),
    (['--init_from=nowhere'], 'no checkpoint nowhere'),
    (['--init_from=gpt2-mediun'], 'by name, which are gpt2, gpt2-medium,'),
    (['--device=meta'], "device='meta' does not work"),
])
def test_a_mistake_is_one_line(script, hf, args, words):
    where = [] if any(arg.startswith('--init_from') for arg in args) else [f'--init_from={hf}']
    assert words in script('sample.py', *where, *args, code=2).stderr


def test_a_folder_that_is_no_model_is_one_line(script, hf, tmp_path):
    (tmp_path / 'config.json').write_text('{"model_type": "bert"}')
    assert "type 'bert'" in script('sample.py', '--init_from=.', code=2).stderr
    (tmp_path / 'config.json').write_text('{"model_type"')
    assert 'config.json' in script('sample.py', '--init_from=.', code=2).stderr


def test_several_answers_to_each_question_of_a_conversation(script, tiny_run):
    """Questions stand above their answers, and none is remembered: the same question has the same prompt."""
    how = ['--chat', '--num_samples=3', '--max_new_tokens=4', '--seed=5', f'--out_dir={tiny_run("minimind")}']
    blocks = script('sample.py', *how, input='Who?\nWhere?\nWho?\n').stdout.split('-' * 40 + '\n')
    assert [block.split('\n')[0] for block in blocks] == ['Who?'] * 3 + ['Where?'] * 3 + ['Who?'] * 3 + ['']
    assert len(set(blocks[:3])) == 3
    greedy = script('sample.py', *how, '--temperature=0', input='Who?\nWhere?\nWho?\n').stdout
    blocks = greedy.split('-' * 40 + '\n')
    assert len(set(blocks[:3] + blocks[6:9])) == 1
    together = script('sample.py', *how, '--temperature=0', '--lines', input='Who?\n\nWhere?\nWho?\n').stdout
    assert together == greedy
    marked = b'\xef\xbb\xbfWho?\r\n\r\nWhere?\r\nWho?'                     # as Notepad saves it
    assert script('sample.py', *how, '--temperature=0', '--lines', input=marked).stdout == greedy
    assert script('sample.py', *how, '--temperature=0', input=marked).stdout == greedy


LONG = 999 * 'x'


@pytest.mark.parametrize('more, typed, code, words', [
    (['--lines'], '\n', 2, 'no line with text'),
    (['--lines'], f'Who?\n{LONG}', 2, 'question 2 is too long'),
    (['--lines'], b'Who?\ncaf\xe9', 2, 'standard input:2: not UTF-8 (byte 0xe9)'),
    ([], b'Who?\ncaf\xe9', 2, 'standard input:2: not UTF-8 (byte 0xe9)'),
    ([], f'{LONG}\nWho?', 1, '1 questions have no answer'),
    ([f'--system={LONG}'], 'Who?', 2, '--system is too long')])
def test_questions_that_cannot_be_answered(script, tiny_run, more, typed, code, words):
    how = ['--chat', *more, '--max_new_tokens=4', f'--out_dir={tiny_run("minimind")}']
    assert words in script('sample.py', *how, input=typed, code=code).stderr.splitlines()[-1]


def test_an_answer_that_the_context_cuts_says_so(script, tiny_run):
    how = ['--chat', '--max_new_tokens=999', '--temperature=0', f'--out_dir={tiny_run("minimind")}']
    assert 'the context of' in script('sample.py', *how, input='Who?').stderr
    assert '2 of 2 answers are cut' in script('sample.py', *how, '--lines', input='Who?\nWhere?').stderr


def test_standard_input_that_is_closed_is_one_line(script, tiny_run, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', None)
    for how in ['--chat'], ['--start=-']:
        assert 'is closed' in script('sample.py', *how, f'--out_dir={tiny_run("minimind")}', code=2).stderr


def test_a_prompt_from_a_file_is_its_text(script, tiny_run, tmp_path):
    """Less a byte order mark; a form feed ends no line; of many prompts the one that is too long is named."""
    how = [f'--out_dir={tiny_run("minimind")}', '--max_new_tokens=2', '--temperature=0']
    (tmp_path / 'prompts').write_bytes(b'\xef\xbb\xbfa\x0cb\r\n\r\nc\r\n')
    out = script('sample.py', *how, '--start=FILE:prompts', '--lines').stdout.split('-' * 40 + '\n')
    assert [text[:3].rstrip('\n') for text in out] == ['a\x0cb', out[1][:3]] and out[1][0] == 'c'
    (tmp_path / 'prompts').write_text(f'a\n{LONG}\n')
    line = script('sample.py', *how, '--start=FILE:prompts', '--lines', code=2).stderr
    assert 'the prompt 2 of --lines has' in line
