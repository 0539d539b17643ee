"""data/download.py, from a server on this machine: checksum, mirror, a connection that breaks, no network."""
import functools
import http.server
import threading
import zipfile

import pytest
from conftest import data_script

from prepare import BUILT_IN, read_labelled

download_py = data_script('download')

TEXT = b'The light is lit at dusk.\n' * 200_000            # 5 MB


class Server(http.server.BaseHTTPRequestHandler):
    """Serves TEXT at any path but /missing; from /broken only a part of it, from /wrong something else."""
    asked = []

    def do_GET(self):
        self.asked.append(self.path)
        if self.path == '/missing':
            return self.send_error(404)
        self.send_response(200)
        self.send_header('Content-Length', str(len(TEXT)))
        self.end_headers()
        self.wfile.write({'/broken': TEXT[:3_000_000], '/wrong': b'x' * len(TEXT)}.get(self.path, TEXT))

    def log_message(self, *args):
        pass


@pytest.fixture
def get(tmp_path):
    """get('/a', '/b') downloads TEXT from these places in turn; what the server was asked is get.asked."""
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sha256 = download_py.hash_of(TEXT)
        Server.asked.clear()

        def get(*paths):
            urls = [f'http://127.0.0.1:{server.server_port}{path}' for path in paths]
            return download_py.download('a.txt', sha256, urls, str(tmp_path / 'downloads'))
        get.asked, get.folder = Server.asked, tmp_path / 'downloads'
        yield get
        server.shutdown()


def test_a_broken_download_leaves_nothing_and_a_whole_one_is_left_alone(get):
    with pytest.raises(SystemExit):
        get('/broken')
    assert not list(get.folder.iterdir())
    for _ in range(2):
        assert open(get('/good'), 'rb').read() == TEXT
    assert get.asked == ['/broken', '/good']
    assert [p.name for p in get.folder.iterdir()] == ['a.txt']


def test_the_mirror_is_asked_next(get, capsys):
    assert open(get('/missing', '/wrong', '/broken', '/whole'), 'rb').read() == TEXT
    assert get.asked == ['/missing', '/wrong', '/broken', '/whole']


@pytest.mark.parametrize('path, words', [('/missing', '404'), ('/wrong', 'another sha256'),
                                         ('/broken', 'IncompleteRead')])
def test_what_cannot_be_had_is_one_line_that_says_where_to_put_it(get, capsys, path, words):
    with pytest.raises(SystemExit):
        get(path)
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and words in error and f"put it at {get.folder / 'a.txt'}" in error


def test_a_file_put_there_by_hand_is_taken_if_it_is_the_right_one(get, capsys):
    get.folder.mkdir()
    (get.folder / 'a.txt').write_bytes(TEXT)
    assert get('/good') == str(get.folder / 'a.txt') and not get.asked
    (get.folder / 'a.txt').write_bytes(TEXT[1:])
    with pytest.raises(SystemExit):
        get('/good')
    assert 'is not the file it should be' in capsys.readouterr().err and not get.asked


def test_the_tutorials_story_is_the_one_of_the_table(shared, tmp_path, monkeypatch):
    (tmp_path / 'the-verdict.txt').write_bytes(shared('data/the-verdict.txt').read_bytes())
    monkeypatch.setattr(download_py, 'urlopen', functools.partial(pytest.fail, 'it is here'))
    path = download_py.download(**download_py.DOWNLOADS['verdict'], folder=str(tmp_path))
    assert path == str(tmp_path / 'the-verdict.txt')


def test_a_downloaded_zip_becomes_a_table(tmp_path):
    with zipfile.ZipFile(tmp_path / 'sms_spam.zip', 'w') as z:
        z.writestr('readme', 'short')
        rows = [f'{"ham" if i % 2 else "spam"}\tmessage {i}\n' for i in range(20)]
        z.writestr('SMSSpamCollection', ''.join(rows))
    pieces = read_labelled(download_py.unzip(str(tmp_path / 'sms_spam.zip')))
    assert {p.label for p in pieces} == {'ham', 'spam'} and len(pieces) == 20


def test_every_set_of_the_table_is_one_that_prepare_py_knows(script):
    commands = {command for _, _, command in BUILT_IN.values()}
    assert {f'data/download.py {name}' for name in download_py.DOWNLOADS} <= commands
    line = script('data/download.py', 'verdit', code=2).stderr
    assert 'verdict, shakespeare, sms_spam, instruction' in line
