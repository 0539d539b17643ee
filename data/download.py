"""
The built-in sets that are a file on the network: fetched, checked by sha256, put into data/raw/.

    python data/download.py verdict         # the-verdict.txt, a story of 20,479 characters, as it is
    python data/download.py shakespeare     # shakespeare.txt, 1.1 MB of plays, as it is
    python data/download.py sms_spam        # sms_spam.zip and, unpacked from it, sms_spam.tsv:
                                            # ham<TAB>Ok lar..., a message per line
    python data/download.py instruction     # instruction.json: [{"instruction": "Edit ...", "input": "...",
                                            #                     "output": "..."}, ...]

A file that you put into data/raw/ yourself is as good, if its sha256 is right.
"""
import hashlib
import io
import os
import sys
import zipfile
from http.client import HTTPException
from urllib.request import urlopen

RAW = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'raw')
VERDICT, SHAKESPEARE = 'ch02/01_main-chapter-code/the-verdict.txt', 'data/tinyshakespeare/input.txt'
INSTRUCTION = 'ch07/01_main-chapter-code/instruction-data.json'
# The name of the file, its sha256, and where to get it: the first address that works is taken.
DOWNLOADS = {
    # chapters I-1 and I-5: a story by Edith Wharton
    'verdict': dict(file='the-verdict.txt',
                    sha256='b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f',
                    urls=[f'https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/{VERDICT}',
                          f'https://cdn.jsdelivr.net/gh/rasbt/LLMs-from-scratch@main/{VERDICT}']),
    'shakespeare': dict(file='shakespeare.txt',
                        sha256='86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed',
                        urls=[f'https://raw.githubusercontent.com/karpathy/char-rnn/master/{SHAKESPEARE}',
                              f'https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/{SHAKESPEARE}']),
    # chapter I-7: the SMS Spam Collection (Almeida et al. 2011), 5,574 messages
    'sms_spam': dict(file='sms_spam.zip',
                     sha256='1587ea43e58e82b14ff1f5425c88e17f8496bfcdb67a583dbff9eefaf9963ce3',
                     urls=['https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip',
                           'https://f001.backblazeb2.com/file/LLMs-from-scratch/sms%2Bspam%2Bcollection.zip']),
    # chapter I-8: 1,100 instructions with answers
    'instruction': dict(file='instruction.json',
                        sha256='7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944',
                        urls=[f'https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/{INSTRUCTION}',
                              f'https://cdn.jsdelivr.net/gh/rasbt/LLMs-from-scratch@main/{INSTRUCTION}']),
}


def fail(message):
    """End over a mistake of the user or a missing network: one line on stderr, exit code 2."""
    print(f"download.py: {message}", file=sys.stderr)
    sys.exit(2)


def hash_of(raw):
    return hashlib.sha256(raw).hexdigest()


def write(path, raw):
    """Write a file, all of it or nothing."""
    part = f'{path}.{os.getpid()}.part'             # two runs at once do not disturb each other
    with open(part, 'wb') as f:
        f.write(raw)
    os.replace(part, path)


def download(file, sha256, urls, folder=RAW):
    """The path of a file in a folder. It is fetched from the first of the urls that has it, unless it is
    there. Ends with one line if no url has it, or if the file that is there has another sha256."""
    path = os.path.join(folder, file)
    if os.path.isfile(path):
        with open(path, 'rb') as f:
            if hash_of(f.read()) != sha256:
                fail(f"{path} is not the file it should be (its sha256 is not {sha256[:16]}...): "
                     f"remove it first")
        return path
    os.makedirs(folder, exist_ok=True)
    for url in urls:
        try:
            with urlopen(url, timeout=30) as response:
                raw = response.read()
        except (OSError, HTTPException) as e:       # no network, no such file, a connection that broke
            reason = f"{type(e).__name__}: {e}"
            continue
        if hash_of(raw) == sha256:
            write(path, raw)
            return path
        reason = f"what {url} sends has another sha256 than {sha256[:16]}..."
    fail(f"cannot download {file} ({reason}): get it from {urls[0]} and put it at {path}")


def unzip(path):
    """The path of the table in a downloaded .zip, its largest file, unpacked beside it as .tsv."""
    table = path.removesuffix('.zip') + '.tsv'
    with zipfile.ZipFile(path) as z:
        write(table, z.read(max(z.infolist(), key=lambda member: member.file_size)))
    return table


if __name__ == '__main__':
    if isinstance(sys.stdout, io.TextIOWrapper):            # it may be closed
        sys.stdout.reconfigure(errors='backslashreplace')   # a path may have letters that a log lacks
    if len(sys.argv) != 2 or sys.argv[1] not in DOWNLOADS:
        fail(f"give one name of {', '.join(DOWNLOADS)}, as in `python data/download.py verdict`")
    try:
        path = download(**DOWNLOADS[sys.argv[1]])
        path = unzip(path) if path.endswith('.zip') else path
    except OSError as e:                            # the folder cannot be written
        fail(f"{e}; get {DOWNLOADS[sys.argv[1]]['urls'][0]} and put it into {RAW}")
    print(f"wrote {path}")
