"""Conversations exact: what is trained is what a model's own chat template renders, token for token; records of
other projects; documents that open as the model was trained. MINIMIND names a clone of the MiniMind project,
or a folder with its tokenizer files by commit."""
import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import TEXT

import prepare
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
SYSTEM, USER, ANSWER = say('system', 'Keep the light.'), say('user', 'Who reads?'), say('assistant', 'The keeper.')
THOUGHT = say('assistant', 'The keeper.', reasoning_content='The rules\n\nsay so.')
USING = [USER, say('assistant', '', tool_calls=[CALL]), say('tool', '{"h": 3}'), ANSWER, say('user', 'And then?'),
         say('assistant', 'I look.', tool_calls=[CALL, dict(name='f', arguments='{"a": 1}')]), say('tool', 'one'),
         say('tool', 'two'), ANSWER]
# name: (messages, whether an answer is asked for, tools)
CHATS = {
    'user': ([USER], True, None), 'answer': ([USER, ANSWER], False, None),
    'system': ([SYSTEM, USER, ANSWER], False, None), 'no system': ([say('system', ''), USER, ANSWER], False, None),
    'turns': ([SYSTEM, USER, ANSWER, USER, ANSWER], False, None),
    'prompt': ([SYSTEM, USER, ANSWER, USER], True, None), 'greeting': ([SYSTEM, ANSWER, USER], True, None),
    'twice': ([USER, ANSWER, ANSWER, USER, ANSWER], False, None),
    'thought': ([USER, THOUGHT], False, None), 'thoughts': ([SYSTEM, USER, THOUGHT, USER, THOUGHT], False, None),
    'old thought': ([USER, THOUGHT, USER, ANSWER], False, None), 'then': ([USER, THOUGHT, USER], True, None),
    'tools': ([SYSTEM, *USING], False, TOOLS), 'tools alone': (USING, False, TOOLS),
    'a result': (USING[:3], True, TOOLS), 'two results': ([SYSTEM, *USING[:8]], True, TOOLS),
    'thought and call': ([USER, dict(THOUGHT, tool_calls=[CALL]), say('tool', 'x'), THOUGHT], False, TOOLS),
    'written out': ([USER, USING[1], say('user', '<tool_response>\nx\n</tool_response>'), THOUGHT], False, TOOLS),
}

# ---- templates, each of a kind that differs from the others ----

TURN = "'<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n'"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
PLAIN = "{% for m in messages %}{{ " + TURN + " }}{% endfor %}" + PROMPT
DEFAULT = ("{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}"
           + PLAIN)
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
             plain=ChatML('', 'given', '', False, False), default=ChatML('Be brief.', 'given', '', False, False),
             last=ChatML('', 'last', '', True, False), always=ChatML('', 'always', '<think>\n', True, False))


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
        off = {} if not tokenizer.layout or tokenizer.layout.thinks == 'given' and not thinking else {
            'enable_thinking': thinking, 'open_thinking': thinking}
        off = {'enable_thinking': thinking} if not tokenizer.layout else off
        text = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **off)
        assert tokenizer.decode(encode_chat(tokenizer, used, prompt, thinking)[0]) == text


@pytest.mark.parametrize('chat', CHATS)
@pytest.mark.parametrize('name', TEMPLATES)
def test_what_is_trained_is_what_the_template_renders(with_template, name, chat):
    tokenizer, theirs = with_template(name, TEMPLATES[name]())
    assert tokenizer.layout == FOUND[name] and not tokenizer.strange
    forgets = name in ('plain', 'default')              # these pass over thoughts, with which we train
    if not (forgets and 'thought' in chat or forgets and chat == 'then'):
        compare(tokenizer, theirs, chat)
