r"""
The built-in sets about Python's standard library: its signatures and docstrings, read from source with `ast`.

    python data/pydoc.py            # no network; a few seconds

writes three files into data/raw/. The version of Python is part of their names, since its docstrings change:

    pydoc-3.12.3.jsonl        for pretraining: a title and its docstring
        {"text": "def dedent(text):\nRemove any common leading whitespace ...\n", "split": "train"}
    pydoc_sft-3.12.3.jsonl    for instruction tuning: questions about a title
        {"conversations": [{"role": "user", "content": "..."}, {"role": "assistant", ...}], "split": "val"}
    pydoc_dpo-3.12.3.jsonl    for DPO: the right answer and a wrong one
        {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...], "split": "train"}

All three hold out the same docstrings. A title is the signature, as in 'def dedent(text)', 'class Thread' or
'module json.tool'.
"""
import ast
import hashlib
import io
import json
import os
import platform
import sys
import sysconfig

RAW = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'raw')
VERSION = platform.python_version()
HELD_OUT = 0.05             # share of the docstrings

SYSTEM = "You know the Python standard library. Answer briefly."
QUESTIONS = dict(
    purpose=["What does this {kind} do?\n{title}", "Explain in short:\n{title}", "{title}\nWhat is it for?",
             "Write a docstring for this {kind}:\n{title}", "Can you tell me what {title} is about?"],
    parameters=["Which parameters does it take?\n{title}", "List the parameters of this function:\n{title}",
                "{title}\nWhat do I have to pass?"],
    follow_up=["And which parameters does it take?", "List its parameters.", "What do I have to pass?"])


def docstrings(root):
    """Yield (title, docstring) of each module, class and function below a folder. Nothing is imported."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages'})
        files += [os.path.join(folder, name) for name in sorted(names) if name.endswith('.py')]
    seen = set()
    for file in files:
        with open(file, 'rb') as f:
            try:
                tree = ast.parse(f.read())
            except (SyntaxError, ValueError):       # templates and the like
                continue
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            doc = ast.get_docstring(node)
            if isinstance(node, ast.Module):
                name = os.path.relpath(file, root).removesuffix('.py').replace(os.sep, '.')
                title = f"module {name.removesuffix('.__init__')}"
            elif isinstance(node, ast.ClassDef):
                title = f"class {node.name}({', '.join(map(ast.unparse, node.bases))})".replace('()', '')
            else:
                title = f"def {node.name}({ast.unparse(node.args)})"
            if doc and (title, doc) not in seen:
                seen.add((title, doc))
                yield title, doc


def number_of(text):
    """A number below 2^32 that looks random, and is the same in each run and on each machine."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def split_of(doc):
    """'train' or 'val' by the docstring, so that functions with the same docstring are on the same side."""
    return 'val' if number_of(doc) < HELD_OUT * 2**32 else 'train'


def summary_of(doc):
    """The first paragraph of a docstring in one line; '' if it is too short or too long for an answer."""
    summary = ' '.join(doc.split('\n\n')[0].split())
    return summary if 10 < len(summary) <= 300 else ''


def turn(role, content):
    return dict(role=role, content=content)


def question(form, title):
    """A user's question about a title, in one of the wordings of its form."""
    forms, kind = QUESTIONS[form], title.split()[0].replace('def', 'function')
    return turn('user', forms[number_of(title) % len(forms)].format(kind=kind, title=title))


def parameters(title):
    """'def f(self, a, *, b=1, **kw)' -> 'a, b, kw'."""
    args = ast.parse(title + ': pass').body[0].args
    names = [a.arg for a in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg) if a]
    return ', '.join(names[names[:1] in (['self'], ['cls']):])


def texts(docs):
    """Records for pretraining."""
    for title, doc in docs:
        yield dict(text=f"{title}:\n{doc}\n", split=split_of(doc))


def conversations(docs):
    """Records for instruction tuning: what a thing is for (its summary), and the parameters of a function,
    asked instead or as a second question. One in four opens with a system message."""
    for title, doc in docs:
        summary = summary_of(doc)
        if not summary:
            continue
        number = number_of(title)
        names = parameters(title) if title.startswith('def ') else ''
        turns = [question('purpose', title), turn('assistant', summary)]
        if names and number // 7 % 3 == 1:
            turns += [question('follow_up', title), turn('assistant', names)]
        elif names and number // 7 % 3 == 2:
            turns = [question('parameters', title), turn('assistant', names)]
        if number // 11 % 4 == 0:
            turns.insert(0, turn('system', SYSTEM))
        yield dict(conversations=turns, split=split_of(doc))


def pairs(docs):
    """Records for DPO: what is this for? Chosen is the summary of the class or function in the question.
    Rejected is a summary of the other kind (a function's for a class) and of about the same length. Each
    summary is chosen once and rejected once, so the answer without its question tells nothing."""
    found = {}                                      # summary: (split, kind, title)
    for title, doc in docs:
        if not title.startswith('module ') and summary_of(doc):
            found.setdefault(summary_of(doc), (split_of(doc), title.split()[0], title))
    for split in ('train', 'val'):
        functions, classes = (sorted((s for s in found if found[s][:2] == (split, kind)),
                                     key=lambda s: (len(s), s)) for kind in ('def', 'class'))
        longer = iter(functions)
        for one in classes:                         # there are several functions per class
            other = next((s for s in longer if len(s) >= len(one)), None)
            for chosen, rejected in ((one, other), (other, one)) if other else ():
                asked = question('purpose', found[chosen][2])
                yield dict(chosen=[asked, turn('assistant', chosen)],
                           rejected=[asked, turn('assistant', rejected)], split=split)


def write(path, records):
    """Write a .jsonl file, all of it or nothing."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = f'{path}.{os.getpid()}.part'             # two runs at once do not disturb each other
    with open(part, 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(record, ensure_ascii=False) + '\n' for record in records)
    os.replace(part, path)
    print(f"wrote {path}")


if __name__ == '__main__':
    if isinstance(sys.stdout, io.TextIOWrapper):            # it may be closed
        sys.stdout.reconfigure(errors='backslashreplace')   # a path may have letters that a log lacks
    root = sysconfig.get_path('stdlib')
    docs = list(docstrings(root))
    paths = {os.path.join(RAW, f'{name}-{VERSION}.jsonl'): make
             for name, make in dict(pydoc=texts, pydoc_sft=conversations, pydoc_dpo=pairs).items()}
    try:
        if not docs:
            raise OSError(f"{root} holds no Python source with docstrings")
        for path, make in paths.items():
            write(path, make(docs))
    except OSError as e:
        print(f"pydoc.py: {e}; put records as in its docstring into {', '.join(paths)}", file=sys.stderr)
        sys.exit(2)
