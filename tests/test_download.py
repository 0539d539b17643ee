"""prepare.py's downloads, from a server on this machine: resume, checksum, mirror, and no network at all."""
import functools
import http.server
import threading

import pytest

import prepare
from prepare import DOWNLOADS, download, hash_of

TEXT = b'The light is lit at dusk.\n' * 200_000            # 5 MB


class Server(http.server.BaseHTTPRequestHandler):
    """Serves TEXT at any path but /missing; from /broken only what it likes; /whole knows no Range."""
    asked = []

    def do_GET(self):
        first = int((self.headers.get('Range') or 'bytes=0-')[6:-1])
        self.asked.append((self.path, first))
        if self.path == '/missing':
            return self.send_error(404)
        first = 0 if self.path == '/whole' else first
        self.send_response(206 if first else 200)
        self.send_header('Content-Length', str(len(TEXT) - first))
        self.end_headers()
        if self.path == '/broken':
            self.wfile.write(TEXT[first:3_000_000])
        else:
            self.wfile.write(b'x' * (len(TEXT) - first) if self.path == '/wrong' else TEXT[first:])

    def log_message(self, *args):
        pass


@pytest.fixture
def get(tmp_path):
    """get('/a', '/b') downloads TEXT from these places in turn; what the server was asked is get.asked."""
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (tmp_path / 'text').write_bytes(TEXT)
        sha256 = hash_of(tmp_path / 'text')
        Server.asked.clear()

        def get(*paths):
            urls = [f'http://127.0.0.1:{server.server_port}{path}' for path in paths]
            return download('a.txt', sha256, urls, str(tmp_path / 'downloads'))
        get.asked, get.folder = Server.asked, tmp_path / 'downloads'
        yield get
        server.shutdown()


def test_a_broken_download_goes_on_where_it_stopped_and_is_then_left_alone(get):
    with pytest.raises(SystemExit):
        get('/broken')
    assert not (get.folder / 'a.txt').exists()
    for _ in range(2):
        assert open(get('/good'), 'rb').read() == TEXT
    assert get.asked == [('/broken', 0), ('/good', 3_000_000)]
    assert [p.name for p in get.folder.iterdir()] == ['a.txt']


def test_the_mirror_is_asked_next(get, capsys):
    assert open(get('/missing', '/wrong', '/broken', '/whole'), 'rb').read() == TEXT
    assert get.asked == [('/missing', 0), ('/wrong', 0), ('/broken', 0), ('/whole', 3_000_000)]


@pytest.mark.parametrize('path, words', [('/missing', '404'), ('/wrong', 'another sha256')])
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
    monkeypatch.setattr(prepare, 'urlopen', functools.partial(pytest.fail, 'it is here'))
    assert download(**DOWNLOADS['verdict'], folder=str(tmp_path)) == str(tmp_path / 'the-verdict.txt')
