"""Conversations exact: what is trained is what a model's own chat template renders, token for token; records
of other projects; documents that open as the model was trained. MINIMIND names a clone of that project."""
import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TEXT

import prepare
import sample
from configurator import Run
from prepare import Piece, messages_of, open_data, pair_of, read_labelled, read_pieces, read_split, write_data
from train_tokenizer import ChatML, Tokenizer, encode_chat, load_tokenizer, own_template, train_bpe


@pytest.fixture(autouse=True)
def nothing_counted():
    prepare.malformed.count, prepare.malformed.reasons = 0, {}
    prepare.unused.clear()


def say(role, content, **more):
    return dict(role=role, content=content, **more)


TOOLS = [dict(type='function', function=dict(name='tide', description='灯塔的潮汐',
                                             parameters=dict(type='object', properties={})))]
CALL = dict(name='tide', arguments=dict(at='noon', n=1))
SYSTEM, USER = say('system', 'Keep the light.'), say('user', 'Who reads?')
ANSWER, NO = say('assistant', 'The keeper.'), say('assistant', 'The sea.')
THOUGHT = say('assistant', 'The keeper.', reasoning_content='The rules\n\nsay so.')
USING = [USER, say('assistant', '', tool_calls=[CALL]), say('tool', '{"h": 3}'), ANSWER,
         say('user', 'And then?'),
         say('assistant', 'I look.', tool_calls=[CALL, dict(name='f', arguments='{"a": 1}')]),
         say('tool', 'one'), say('tool', 'two'), ANSWER]
# name: (messages, whether an answer is asked for, tools)
CHATS = {
    'user': ([USER], True, None), 'answer': ([USER, ANSWER], False, None),
    'system': ([SYSTEM, USER, ANSWER], False, None),
    'no system': ([say('system', ''), USER, ANSWER], False, None),
    'turns': ([SYSTEM, USER, ANSWER, USER, ANSWER], False, None),
    'prompt': ([SYSTEM, USER, ANSWER, USER], True, None), 'greeting': ([SYSTEM, ANSWER, USER], True, None),
    'twice': ([USER, ANSWER, ANSWER, USER, ANSWER], False, None),
    'thought': ([USER, THOUGHT], False, None),
    'thoughts': ([SYSTEM, USER, THOUGHT, USER, THOUGHT], False, None),
    'old thought': ([USER, THOUGHT, USER, ANSWER], False, None), 'then': ([USER, THOUGHT, USER], True, None),
    'tools': ([SYSTEM, *USING], False, TOOLS), 'tools alone': (USING, False, TOOLS),
    'a result': (USING[:3], True, TOOLS), 'two results': ([SYSTEM, *USING[:8]], True, TOOLS),
    'thought and call': ([USER, dict(THOUGHT, tool_calls=[CALL]), say('tool', 'x'), THOUGHT], False, TOOLS),
    'written out': ([USER, USING[1], say('user', '<tool_response>\nx\n</tool_response>'), THOUGHT], False,
                    TOOLS),
}

# ---- templates, each of a kind that differs from the others ----

TURN = "'<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n'"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
PLAIN = "{% for m in messages %}{{ " + TURN + " }}{% endfor %}" + PROMPT
DEFAULT = ("{% if messages[0].role != 'system' %}"
           "{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}" + PLAIN)
HEAD = """{% if tools %}{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}{{ INTRO }}
{%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}{{ OUTRO + '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}"""
# Qwen3's: thoughts behind the last question stay, older ones are forgotten
LAST = HEAD + """{% set ns = namespace(open=true, last=messages | length - 1) %}
{%- for m in messages[::-1] %}
  {%- if ns.open and m.role == 'user' and not (m.content.startswith('<tool_response>')
                                              and m.content.endswith('</tool_response>')) %}
    {%- set ns.open = false %}{% set ns.last = messages | length - 1 - loop.index0 %}
  {%- endif %}
{%- endfor %}
{%- for m in messages %}
  {%- if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
  {%- elif m.role == 'tool' %}
    {%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
    {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
  {%- elif m.role == 'assistant' %}
    {%- set thought, content = m.reasoning_content or '', m.content %}
    {%- if not thought and '</think>' in content %}
      {%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if KEEPS %}
      {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
    {%- else %}{{ content }}{% endif %}
    {%- for call in m.tool_calls or [] %}
      {%- if content or not loop.first %}{{ '\\n' }}{% endif %}
      {%- set call = call.function or call %}
      {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
      {{- call.arguments if call.arguments is string else call.arguments | tojson }}{{ '}\\n</tool_call>' }}
    {%- endfor %}{{ '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
  {%- if ASKS %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""


def filled(template, **parts):
    own = own_template(ChatML())
    parts['INTRO'] = own[own.index('"# Tools'):own.index('<tools>" }}') + 8]
    parts['OUTRO'] = own[own.index('"\\n</tools>'):own.index('</tool_call>" }}') + 13]
    for name, part in parts.items():
        template = template.replace(name, part)
    return template


TEMPLATES = {
    'ours': lambda: own_template(ChatML()), 'alpaca': lambda: own_template(None),
    'plain': lambda: PLAIN, 'default': lambda: DEFAULT,
    'last': lambda: filled(LAST, KEEPS='loop.index0 > ns.last and (loop.last or thought)',
                           ASKS='enable_thinking is defined and not enable_thinking'),
    'always': lambda: filled(LAST, KEEPS='true', ASKS='not open_thinking').replace(
        "{% endif %}\n{%- endif %}", "{% else %}{{ '<think>\\n' }}{% endif %}\n{%- endif %}"),
}
FOUND = dict(ours=ChatML(), alpaca=None,
             plain=ChatML('', 'given', '', False, False),
             default=ChatML('Be brief.', 'given', '', False, False),
             last=ChatML('', 'last', '', True, False),
             always=ChatML('', 'always', '<think>\n', True, False))


@pytest.fixture(scope='module')
def with_template(tmp_path_factory, byte_tokenizer):
    """with_template(name) is (our tokenizer, transformers') of a folder with that chat template."""
    transformers, known = pytest.importorskip('transformers'), {}

    def make(name, template):
        if name not in known:
            folder = tmp_path_factory.mktemp('layout')
            own = byte_tokenizer if name == 'alpaca' else Tokenizer(train_bpe([TEXT] * 5, 350))
            own.save(folder)
            config = json.loads((folder / 'tokenizer_config.json').read_text(encoding='utf-8'))
            (folder / 'tokenizer_config.json').write_text(json.dumps(dict(config, chat_template=template)))
            known[name] = load_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
        return known[name]
    return make


def compare(tokenizer, theirs, chat):
    """Whether encode_chat gives the text of apply_chat_template, with thinking off and on."""
    messages, prompt, tools = CHATS[chat]
    used = [dict(messages[0], tools=tools), *messages[1:]] if tools else messages
    has_tools = tokenizer.layout and tokenizer.layout.tools
    if tools and not has_tools:
        with pytest.raises(ValueError, match='no place'):
            encode_chat(tokenizer, used, prompt)
        return
    for thinking in (False, True) if prompt else (False,):
        given = tokenizer.layout and tokenizer.layout.thinks == 'given'         # and not thinking by default
        off = {} if given and not thinking else dict(enable_thinking=thinking, open_thinking=thinking)
        text = theirs.apply_chat_template(messages, tools=tools, tokenize=False,
                                          add_generation_prompt=prompt, **off)
        assert tokenizer.decode(encode_chat(tokenizer, used, prompt, thinking)[0]) == text


@pytest.mark.parametrize('chat', CHATS)
@pytest.mark.parametrize('name', TEMPLATES)
def test_what_is_trained_is_what_the_template_renders(with_template, name, chat):
    tokenizer, theirs = with_template(name, TEMPLATES[name]())
    assert tokenizer.layout == FOUND[name] and not tokenizer.strange
    forgets = name in ('plain', 'default')              # these pass over thoughts, with which we train
    if not (forgets and 'thought' in chat or forgets and chat == 'then'):
        compare(tokenizer, theirs, chat)


MINIMIND = {    # commit: (its layout, default system message)
    'HEAD': ChatML('', 'always', '<think>\n', True, False),
    '4014e62': ChatML('You are a helpful assistant', 'given', '', True, False),
    '274483c': ChatML('You are a helpful assistant', 'given', '', False, False)}


@pytest.mark.parametrize('commit', MINIMIND)
def test_the_official_templates_are_rendered_exactly(tmp_path, commit):
    """MiniMind-3's, MiniMind2's later one and its first."""
    transformers = pytest.importorskip('transformers')
    if not (clone := os.environ.get('MINIMIND')):
        pytest.skip("MINIMIND names no clone of the MiniMind project")
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        listed = subprocess.run(['git', '-C', clone, 'ls-tree', '-r', '--name-only', commit], text=True,
                                capture_output=True, check=True).stdout.splitlines()
        path = next(path for path in listed if Path(path).name == name)
        shown = subprocess.run(['git', '-C', clone, 'show', f'{commit}:{path}'], check=True,
                               capture_output=True)
        (tmp_path / name).write_bytes(shown.stdout)
    tokenizer = load_tokenizer(str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.layout == MINIMIND[commit] and not tokenizer.strange
    assert (tokenizer.bos, tokenizer.eot, tokenizer.ends) == (1, 0, {0, 2})
    given = tokenizer.layout.thinks == 'given'
    for chat in CHATS:
        if commit == '274483c' and chat in ('greeting', 'twice'):
            continue                                    # its template opens an answer behind a question only
        if not (given and ('thought' in chat or chat in ('then', 'written out'))):
            compare(tokenizer, theirs, chat)


@pytest.mark.parametrize('template', [
    PLAIN.replace('im_start', 'start'), PLAIN + '{{ bos_token }}',
    '{{ raise_exception("no") }}', '{% for %}', '',
    '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x',
    "{{ 'x' * 10**10 }}",
    '{{ 9 ** 9 ** 9 }}', '(' * 9999, '{{' + '(' * 9999, '{% if 1 %}' * 300, 'x' * 3_000_000])
def test_an_unknown_template_is_one_line_and_ours_after_training(tmp_path, tokenizer, capsys, template):
    other = Tokenizer(tokenizer.backend, 'hf', dict(chat_template=template, bos_token='<|endoftext|>'))
    assert other.layout == ChatML() and other.strange == bool(template)
    other.take_own_layout()
    line = capsys.readouterr().err
    assert not template or line.count('\n') == 1 and 'the chat template of hf is none that is known' in line
    other.save(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.words['chat_template'] == (own_template(ChatML()) if template else '') and not again.strange


@pytest.mark.parametrize('kind', ['tokenizer', 'byte_tokenizer'])
def test_a_template_is_known_by_what_it_renders(request, kind):
    """Written in another way, and by a tokenizer with names of its own for what ends a text."""
    own = request.getfixturevalue(kind)
    template = own_template(own.layout).replace('ns.preface', 'ns.head').replace('preface=', 'head=')
    words = dict(chat_template='{##}' + template, eos_token=dict(content=own.backend.id_to_token(own.eot)))
    other = Tokenizer(own.backend, words=words)
    assert other.layout == own.layout and not other.strange
    strange = Tokenizer(own.backend, words=dict(words, chat_template=template + '{{ eos_token }}'))
    assert strange.layout == own.layout and strange.strange


# ---- the mask ----

def said(tokenizer, messages):
    """What is target. The prompt for the last answer is a prefix of all, and none of it is a target."""
    ids, mask = encode_chat(tokenizer, messages)
    prompt, zeros = encode_chat(tokenizer, messages[:-1], True, 'reasoning_content' in messages[-1])
    n = len(prompt)
    assert ids[:n] == prompt and mask[:n] == zeros and mask[n - 1:n + 1] == [0, 1]
    return ''.join(tokenizer.decode([token]) for token, target in zip(ids, mask) if target)


@pytest.mark.parametrize('name, plain, thought', [
    ('ours', 'The keeper.', ''), ('alpaca', 'The keeper.', ''), ('plain', 'The keeper.', '<think>\n'),
    ('last', 'The keeper.', '<think>\n'), ('always', 'The keeper.', '')])
def test_targets_are_what_the_assistant_says_and_its_end(with_template, name, plain, thought):
    tokenizer, _ = with_template(name, TEMPLATES[name]())
    end = '<|endoftext|>' if name == 'alpaca' else '<|im_end|>'
    thought += 'The rules\n\nsay so.\n</think>\n\n' + plain + end
    assert said(tokenizer, [SYSTEM, USER, ANSWER]) == plain + end
    assert said(tokenizer, [SYSTEM, USER, ANSWER, USER, ANSWER]) == 2 * (plain + end)
    assert said(tokenizer, [USER, THOUGHT]) == thought
    old = plain + end if name == 'last' else thought
    assert said(tokenizer, [USER, THOUGHT, USER, THOUGHT]) == old + thought
    if tokenizer.layout and tokenizer.layout.tools:
        call = '<tool_call>\n{"name": "tide", "arguments": {"at": "noon", "n": 1}}\n</tool_call>'
        assert said(tokenizer, [dict(SYSTEM, tools=TOOLS), *USING[:4]]) == call + end + plain + end


# ---- records of other projects ----

ARGUMENTS = '{"at": "noon", "n": 1}'
WITH_CALL = (dict(USER, tools=TOOLS), say('assistant', '', tool_calls=[CALL]),
             say('tool', '{"h": 3}'), ANSWER)
RECORDS = {
    'thoughts': (dict(conversations=[USER, THOUGHT]), (USER, THOUGHT)),
    'only thoughts': (dict(messages=[USER, dict(THOUGHT, content=None)]), (USER, dict(THOUGHT, content=''))),
    'minimind': (dict(conversations=[
        say('system', '# Tools ...', tools='[...]'), USER,
        say('assistant', '', tool_calls=json.dumps([CALL]), reasoning_content=None), WITH_CALL[2], ANSWER]),
        (say('system', '# Tools ...', tools=['[...]']), USER, *WITH_CALL[1:])),
    'openai': (dict(messages=[USER, dict(role='assistant', content=None, tool_calls=[
        dict(id='1', type='function', function=dict(name='tide', arguments=ARGUMENTS))]),
        WITH_CALL[2], ANSWER], tools=json.dumps(TOOLS)),
        (WITH_CALL[0], say('assistant', '', tool_calls=[dict(CALL, arguments=ARGUMENTS)]), *WITH_CALL[2:])),
    'no arguments': (dict(messages=[USER, dict(role='assistant', tool_calls=[dict(name='f')])]),
                     (USER, say('assistant', '', tool_calls=[dict(name='f', arguments={})]))),
    'sharegpt': (dict(conversations=[{'from': 'system', 'value': 'Keep the light.'},
                                     {'from': 'human', 'value': 'Who reads?'},
                                     {'from': 'function_call', 'value': json.dumps(CALL)},
                                     {'from': 'observation', 'value': '{"h": 3}'},
                                     {'from': 'gpt', 'value': 'The keeper.'}]),
                 (SYSTEM, USER, *WITH_CALL[1:])),
    'parts': (dict(messages=[say('user', [dict(type='text', text=t) for t in ('Who ', 'reads?')]), ANSWER]),
              (USER, ANSWER)),
    'empty system': (dict(messages=[say('system', ' '), USER, ANSWER]),
                     (say('system', ''), USER, ANSWER)),
    'greeting': (dict(messages=[SYSTEM, say('assistant', 'Hi'), USER, ANSWER]),
                 (SYSTEM, say('assistant', 'Hi'), USER, ANSWER)),
    'twice': (dict(messages=[USER, ANSWER, ANSWER, USER, ANSWER]), (USER, ANSWER, ANSWER, USER, ANSWER)),
    'tail': (dict(messages=[USER, ANSWER, say('user', 'bye')]), (USER, ANSWER)),
    'empty result': (dict(messages=[USER, WITH_CALL[1], say('tool', None), ANSWER, say('tool', 'x')]),
                     (USER, WITH_CALL[1], say('tool', ''), ANSWER)),
}


@pytest.mark.parametrize('name', RECORDS)
def test_records_of_other_projects(name, tokenizer):
    record, messages = RECORDS[name]
    assert messages_of(record) == messages
    assert prepare.unused == ({'turn after the last answer': 1} if name in ('tail', 'empty result') else {})
    ids, mask = encode_chat(tokenizer, messages)
    assert any(mask) and prepare.plain_text([messages])


def calls(calls, **more):
    return dict(messages=[USER, say('assistant', None, tool_calls=calls, **more)])


@pytest.mark.parametrize('call', [json.dumps([dict(id='1')]), [dict(id='1')]])
def test_a_call_without_a_name_is_taken_as_it_is_and_counted(tokenizer, call):
    messages = messages_of(calls(call))
    assert prepare.unused == {'place for the name of a call, which has none': 1}
    text = tokenizer.decode(encode_chat(tokenizer, messages)[0])
    assert '<tool_call>\n{"id": "1"}\n</tool_call>' in text


BAD = {
    'role': (dict(messages=[say('function', 'x'), ANSWER]), "unknown role 'function'; there are"),
    'sharegpt role': (dict(conversations=[{'from': 'bing', 'value': 'x'}]), "unknown role 'bing'"),
    'list role': (dict(conversations=[{'from': ['x'], 'value': 'x'}]), "unknown role ['x']"),
    'no value': (dict(conversations=[{'from': 'human'}]), 'no field "value" among from'),
    'image': (dict(messages=[say('user', [dict(type='image_url', image_url='x')]), ANSWER]),
              'no field "text" among type'),
    'no json': (calls('f(x)'), 'the call of turn 2, of the assistant, is no call of a tool but f(x)'),
    'null': (calls([None]), 'is no call of a tool but null'),
    'empty call': (calls([dict(function={})]), 'is no call of a tool but {}'),
    'nothing': (calls('[]', reasoning_content=''), 'turn 2, of the assistant, is not a text but null'),
    'blank': (dict(messages=[USER, say('assistant', ' ', tool_calls=[])]),
              'turn 2, of the assistant, is empty'),
    'thought': (dict(messages=[USER, say('assistant', 'x', reasoning_content=3)]), 'the thought of turn 2'),
    'result': (dict(messages=[USER, say('tool', 'x'), ANSWER]), "turn 2 is the tool's, where the as"),
    'asks twice': (dict(messages=[USER, ANSWER, WITH_CALL[2], USER, ANSWER]), "turn 4 is the user's"),
    'half': (calls([dict(name='f', arguments='\ud83d')]), 'surrogates'),
    'half tool': (dict(messages=[USER, ANSWER], tools=[{'\ud83d': 1}]), 'surrogates'),
    'only a greeting': (dict(messages=[ANSWER, USER]), 'nothing answers it'),
}


@pytest.mark.parametrize('name', BAD)
def test_records_that_stay_malformed(tmp_path, name, capsys):
    record, words = BAD[name]
    (tmp_path / 'a.jsonl').write_text(json.dumps(record))
    with pytest.raises(SystemExit, match='2'):
        list(read_pieces(str(tmp_path / 'a.jsonl'), 'sft'))
    line = capsys.readouterr().err
    assert line.count('\n') == 1 and 'a.jsonl:1: ' in line and words in line, line


@pytest.mark.parametrize('record, expected', [
    (dict(prompt='Who reads?', chosen='The keeper.', rejected='The sea.'), ((USER, ANSWER), NO)),
    (dict(prompt=[SYSTEM, USER], chosen=[ANSWER], rejected=[NO]), ((SYSTEM, USER, ANSWER), NO)),
    (dict(prompt='Who reads?', chosen=[USER, ANSWER], rejected=[USER, NO]), ((USER, ANSWER), NO)),
    (dict(conversations=[{'from': 'human', 'value': 'Who reads?'}],
          chosen={'from': 'gpt', 'value': 'The keeper.'},
          rejected={'from': 'gpt', 'value': 'The sea.'}), ((USER, ANSWER), NO)),
    (dict(chosen=[USER, THOUGHT], rejected=[USER, ANSWER]), ((USER, THOUGHT), ANSWER)),
    (dict(chosen=[USER, WITH_CALL[1]], rejected=[USER, ANSWER], tools=TOOLS), (WITH_CALL[:2], ANSWER)),
    (dict(instruction='Who reads?', chosen='The keeper.', rejected='The sea.'), ((USER, ANSWER), NO))])
def test_pairs_of_other_projects(tokenizer, record, expected):
    assert pair_of(record) == expected and not +prepare.unused
    (chosen, mask), _ = train_pair = prepare.encode_pair(tokenizer, *expected)
    assert len(train_pair) == 2 and tokenizer.decode(
        [i for i, target in zip(chosen, mask) if target]).endswith('<|im_end|>')


@pytest.mark.parametrize('record, words', [
    (dict(chosen=[USER, THOUGHT], rejected=[USER, THOUGHT]), 'are the same answer'),
    (dict(chosen=[ANSWER], rejected=[NO]), '"chosen": no turn is the user'),
    (dict(prompt=3, chosen='x', rejected='y'), 'is not a list of turns but "x"'),
    (dict(prompt=[3], chosen='x', rejected='y'), '"chosen": no field "role" or "from"'),
    (dict(prompt='x', chosen=[3], rejected='y'), '"chosen": no field "role"'),
    (dict(prompt='x', chosen=3, rejected='y'), '"chosen": no field "role"'),
    (dict(chosen=[say('system', 'a'), USER, ANSWER], rejected=[USER, NO]), 'answer different prompts')])
def test_pairs_that_stay_malformed(record, words):
    with pytest.raises(ValueError, match=words):
        pair_of(record)


@pytest.mark.parametrize('task', ['sft', 'dpo'])
def test_what_a_layout_has_no_place_for_is_malformed(script, tmp_path, byte_tokenizer, task):
    byte_tokenizer.save(tmp_path / 't')
    good = [dict(messages=[say('user', f'Who {i}?'), ANSWER]) for i in range(60)]
    tools = dict(messages=list(USING[:4]), tools=TOOLS)
    if task == 'dpo':
        good = [dict(chosen=record['messages'], rejected=[record['messages'][0], NO]) for record in good]
        tools = dict(chosen=tools['messages'], rejected=[*USING[:3], NO], tools=TOOLS)
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, [*good[:30], tools, *good[30:]])))
    options = ['--input=a.jsonl', '--tokenizer=t', '--dataset=./d']
    line = script('prepare.py', *options, code=2).stderr
    assert 'a.jsonl:31: tools, and the chat template of this tokenizer has no place' in line
    assert not (tmp_path / 'd').exists()
    done = script('prepare.py', *options, '--on_error=skip').stderr
    assert 'skipped 1 malformed records: 1 x tools, and' in done and 'first at a.jsonl:31' in done


def test_the_tail_is_counted_aloud(script, tmp_path, tokenizer_folder):
    records = [dict(messages=[say('user', f'Who {i}?'), ANSWER, say('user', 'bye')]) for i in range(60)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, records)))
    done = script('prepare.py', '--input=a.jsonl', f'--tokenizer={tokenizer_folder}', '--dataset=./d')
    assert done.stderr == 'not used: 60 x turn after the last answer\n'


# ---- folders, .gz, .parquet ----

TASKS = {
    'pretrain': [dict(text=f'Rule {i}. {TEXT[:i]}') for i in range(60)],
    'sft': [dict(messages=[say('user', f'Who {i}?'), dict(THOUGHT, tool_calls=json.dumps([CALL]))])
            for i in range(60)],
    'dpo': [dict(prompt=f'Who {i}?', chosen='I', rejected='it') for i in range(60)]}


def sides_of(source, task):
    return [(piece.split, piece.content) for piece in read_pieces(str(source), task, 0.3)]


@pytest.mark.parametrize('task', TASKS)
def test_a_record_is_the_same_in_every_container(tmp_path, task):
    records, lines = TASKS[task], '\n'.join(map(json.dumps, TASKS[task])).encode()
    (tmp_path / 'a.jsonl').write_bytes(lines)
    (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress(lines))
    (tmp_path / 'C.JSON.GZ').write_bytes(gzip.compress(json.dumps(records).encode()))
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'a.jsonl').write_bytes(lines[:lines.index(b'\n')])
    (tmp_path / 'folder' / 'b.jsonl.gz').write_bytes(gzip.compress(lines[lines.index(b'\n') + 1:]))
    expected = sides_of(tmp_path / 'a.jsonl', task)
    assert len(expected) == 60 and {side for side, _ in expected} == {'train', 'val'}
    for name in ('b.jsonl.gz', 'C.JSON.GZ', 'folder'):
        assert sides_of(tmp_path / name, task) == expected
        assert prepare.task_of(str(tmp_path / name)) == (task, False)


@pytest.mark.parametrize('task', TASKS)
def test_parquet(tmp_path, task):
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    records = [dict(record, note=None if i % 2 else 'x') for i, record in enumerate(TASKS[task])]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / 'a.parquet', row_group_size=7)
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, TASKS[task])))
    assert sides_of(tmp_path / 'a.parquet', task) == sides_of(tmp_path / 'a.jsonl', task)
    assert prepare.unused == {'"note"': 30} and prepare.task_of(str(tmp_path / 'a.parquet')) == (task, False)
    (tmp_path / 'shards').mkdir()
    for i in (0, 1):
        half = pyarrow.Table.from_pylist(records[30 * i:30 * i + 30])
        parquet.write_table(half, tmp_path / 'shards' / f'{i}.parquet')
    assert sides_of(tmp_path / 'shards', task) == sides_of(tmp_path / 'a.jsonl', task)


def test_a_parquet_table_of_labels(script, tmp_path, tokenizer_folder, capsys):
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    table = dict(label=[i % 2 for i in range(40)], text=[f'row {i}' for i in range(40)])
    parquet.write_table(pyarrow.table(table), tmp_path / 'a.parquet')
    pieces = read_labelled(str(tmp_path / 'a.parquet'))
    assert {(p.label, p.content) for p in pieces} == {(str(i % 2), f'row {i}') for i in range(40)}
    done = script('prepare.py', '--input=a.parquet', f'--tokenizer={tokenizer_folder}', '--dataset=./d')
    assert "label '1': 20 of 20 texts" in done.stdout
    script('prepare.py', '--input=a.parquet', f'--tokenizer={tokenizer_folder}', '--dataset=./d',
           '--task=pretrain', '--val_fraction=0.3')
    assert read_split('./d', 'train').mask.all()         # now each token is a target
    parquet.write_table(pyarrow.table(dict(text=[b'x'])), tmp_path / 'b.parquet')
    raw = (tmp_path / 'a.parquet').read_bytes()
    (tmp_path / 'c.parquet').write_bytes(raw[:200] + raw[300:])
    (tmp_path / 'mix').mkdir()
    (tmp_path / 'mix' / 'a.parquet').write_bytes(raw)
    (tmp_path / 'mix' / 'b.txt').write_text('one')
    line = script('prepare.py', '--input=mix', f'--tokenizer={tokenizer_folder}', '--dataset=./m',
                  code=2).stderr
    assert 'mix/b.txt: a .txt file is for pretraining' in line
    for name, words in (('b', 'record 1: "text" is not a text but'), ('c', 'c.parquet: ')):
        with pytest.raises(SystemExit, match='2'):
            list(read_pieces(str(tmp_path / f'{name}.parquet')))
        line = capsys.readouterr().err
        assert line.count('\n') == 1 and words in line, line


def test_without_pyarrow_a_parquet_file_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    (tmp_path / 'a.parquet').write_bytes(b'PAR1')
    with pytest.raises(SystemExit, match='2'):
        list(read_pieces(str(tmp_path / 'a.parquet')))
    assert 'need a package: pip install pyarrow' in capsys.readouterr().err


def test_packed_text_and_tables(script, tmp_path, tokenizer, tokenizer_folder):
    rows = 'label,text\n' + ''.join(f'{"ab"[i % 2]},row {i}\n' for i in range(40))
    for name, text in (('novel.txt', TEXT * 40), ('mail.csv', rows)):
        (tmp_path / name).write_text(text)
        (tmp_path / f'{name}.gz').write_bytes(gzip.compress(text.encode()))
        plain, packed = (list(read_labelled(str(file)) if 'mail' in name else read_pieces(str(file)))
                         for file in (tmp_path / name, tmp_path / f'{name}.gz'))
        assert plain == packed
    script('prepare.py', '--input=novel.txt.gz', f'--tokenizer={tokenizer_folder}', '--dataset=./novel')
    parts = [tokenizer.decode(read_split('./novel', split).tokens) for split in ('train', 'val')]
    assert ''.join(parts) == TEXT * 40 + '<|endoftext|>'


@pytest.mark.parametrize('spoil', [
    lambda raw: raw[:len(raw) // 2], lambda raw: b'no gzip' + raw,
    lambda raw: raw[:90] + bytes(9) + raw[99:], lambda raw: raw[:-6] + b'\1' * 6])
@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.json.gz', 'a.txt.gz', 'a.csv.gz'])
def test_a_damaged_gz_is_one_line(tmp_path, capsys, name, spoil):
    texts = TASKS['pretrain']
    text = {'l': '\n'.join(map(json.dumps, texts)), 'n': json.dumps(texts), 't': TEXT * 9,
            'v': ''.join(f'{"ab"[i % 2]},row {i}\n' for i in range(99))}[name[-4]]
    (tmp_path / name).write_bytes(spoil(gzip.compress(text.encode())))
    with pytest.raises(SystemExit, match='2'):
        list((read_labelled if 'csv' in name else read_pieces)(str(tmp_path / name)))
    line = capsys.readouterr().err
    assert line.count('\n') == 1 and f'{name}:' in line and '--on_error=skip' in line, line


def test_progress_of_a_gz_is_of_the_packed_file(tmp_path, monkeypatch):
    (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress('\n'.join(map(json.dumps, TASKS['sft'])).encode()))
    shown = []
    monkeypatch.setattr(prepare.Progress, 'show', lambda self, fraction: shown.append(fraction))
    list(read_pieces(str(tmp_path / 'a.jsonl.gz'), 'sft'))
    assert len(shown) == 60 and 0 < max(shown) <= 1


@pytest.mark.parametrize('kinds', ['sft pretrain', 'pretrain sft', 'dpo sft', 'sft dpo'])
def test_a_folder_of_mixed_kinds_is_one_line(script, tmp_path, tokenizer_folder, kinds):
    (tmp_path / 'mix').mkdir()
    for name, kind in zip('ab', kinds.split()):
        (tmp_path / 'mix' / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, TASKS[kind])))
    line = script('prepare.py', '--input=mix', f'--tokenizer={tokenizer_folder}', '--dataset=./d',
                  code=2).stderr
    assert 'mix/b.jsonl:1: no field ' in line


# ---- how documents open, and whose layout they have ----

@pytest.fixture
def opens(tokenizer):
    """A tokenizer whose model was trained on documents that <|im_start|> opens, as MiniMind's are."""
    words = dict(bos_token='<|im_start|>', eos_token=dict(content='<|im_end|>'))
    return Tokenizer(tokenizer.backend, words=words)


def test_documents_open_as_the_model_was_trained(tmp_path, tokenizer, opens):
    assert (opens.bos, opens.eot) == (1, 0)
    pieces = [Piece('train', 'one'), Piece('train', 'two', ends_document=False), Piece('train', ' three',
              begins_document=False), Piece('train', '<|im_start|>four'), Piece('val', 'five')]
    tokenizer.backend.encode_special_tokens = False
    try:
        write_data(str(tmp_path / 'a'), opens, pieces, 'test')
        write_data(str(tmp_path / 'b'), tokenizer, pieces, 'test')
    finally:
        tokenizer.backend.encode_special_tokens = True
    one, two, three, four = (tokenizer.encode(text) for text in ('one', 'two', ' three', 'four'))
    data, ours = (read_split(str(tmp_path / name), 'train') for name in 'ab')
    assert data.tokens.tolist() == [1, *one, 0, 1, *two, *three, 0, 1, *four, 0]
    assert ours.tokens.tolist() == [*one, 0, *two, *three, 0, 1, *four, 0] and ours.mask.all()
    # what is added is no target; what the text has is
    assert [i for i, target in enumerate(data.mask) if not target] == [0, len(one) + 2]
    assert data.offsets.tolist() == [0, len(one) + 2, len(one) + len(two) + len(three) + 4, len(data.tokens)]


def test_a_long_text_opens_once(tmp_path, opens):
    (tmp_path / 'a.txt').write_text(TEXT * 9)
    parts = prepare.read_txt(str(tmp_path / 'a.txt'), 0.1, size=200)
    assert [piece.begins_document for piece in parts][:3] == [True, False, False]
    write_data(str(tmp_path / 'd'), opens, read_pieces(str(tmp_path / 'a.txt')), 'a.txt')
    train, val = (read_split(str(tmp_path / 'd'), split) for split in ('train', 'val'))
    assert train.tokens.tolist().count(1) == 1 and train.tokens[0] == 1 and not (val.tokens == 1).any()


@pytest.mark.parametrize('task', ['sft', 'dpo'])
def test_data_of_another_layout_is_refused(tmp_path, tokenizer, capsys, task):
    """Same ids, so the same fingerprint."""
    run, folder = Run(None, None, 0, 1), str(tmp_path / 'd')
    other = Tokenizer(tokenizer.backend, 'minimind', dict(chat_template=DEFAULT))
    content = ((USER, ANSWER),) if task == 'sft' else ((USER, ANSWER), NO)
    write_data(folder, other, [Piece(split, content) for split in ('train', 'val')], 'test', task)
    assert open_data(run, folder, task, other) and open_data(run, folder, task)
    with pytest.raises(SystemExit, match='2'):
        open_data(run, folder, task, tokenizer)
    line = capsys.readouterr().err
    assert line.count('\n') == 1 and 'was tokenised otherwise than by gpt2: run `python prepare.py' in line


# ---- a conversation with the model ----

SAID = {name: 'The rules.\n</think>\n\nThe keeper.' for name in ('ours', 'alpaca', 'always')}
SAID['last'] = '<think>\n' + SAID['ours']


@pytest.mark.parametrize('name', SAID)
def test_a_conversation_with_thoughts_is_what_the_template_renders(with_template, monkeypatch, capsys, name):
    tokenizer, theirs = with_template(name, TEMPLATES[name]())
    prompts = []

    def generate(model, tokens, *_, **how):
        prompts.append(tokenizer.decode(tokens[0].tolist()))
        answer = tokenizer.encode(SAID[name] if len(prompts) != 2 else SAID[name][:16])     # is cut short
        yield from (torch.tensor([token]) for token in answer)
    monkeypatch.setattr(sample, 'generate', generate)
    typed = io.BytesIO(b'Who?\nAnd?\nWho?\n/reset\nWho?\n/exit\nno\n')
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(typed))
    model = torch.nn.Linear(1, 1)
    model.config = type('Config', (), dict(context=4096, trained_length=0))
    sample.converse(model, tokenizer, 'Keep it.', True, 1, 50)
    half = SAID[name][:16].removeprefix('<think>').strip()
    history = [say('system', 'Keep it.'), say('user', 'Who?'),
               say('assistant', 'The keeper.', reasoning_content='The rules.'), say('user', 'And?'),
               say('assistant', '', reasoning_content=half), say('user', 'Who?')]
    asked = [history[:2], history[:4], history, history[:2]]
    how = dict(tokenize=False, add_generation_prompt=True, enable_thinking=True, open_thinking=True)
    assert prompts == [theirs.apply_chat_template(messages, **how) for messages in asked]
    assert capsys.readouterr().out.count('The keeper.') == 3


def test_thinking_without_a_place_for_thoughts_is_refused(with_template, capsys):
    tokenizer, _ = with_template('default', DEFAULT)
    with pytest.raises(SystemExit, match='2'):
        sample.converse(torch.nn.Linear(1, 1), tokenizer, '', True, 1, 50)
    assert '--thinking: the chat template of this model has no place for thoughts' in capsys.readouterr().err


def test_prepare_says_that_a_template_is_unknown(script, tmp_path, tokenizer):
    Tokenizer(tokenizer.backend, words=dict(chat_template='{{ x }}')).save(tmp_path / 't')
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, TASKS['dpo'])))
    done = script('prepare.py', '--input=a.jsonl', '--tokenizer=t', '--dataset=./d')
    assert done.stderr.count('\n') == 1 and 'is none that is known here' in done.stderr
    assert load_tokenizer('d').words['chat_template'] == own_template(ChatML())
    assert open_data(Run(None, None, 0, 1), './d', 'dpo', load_tokenizer('t'))
