"""Rows of `FAULTS.md` about what the user gives: data, names, options, GPUs; each docstring quotes its row."""
import json
from pathlib import Path

import pytest
import torch

from faults import OPTIONS, RUN, files, one_line
from flow_study.config import TrainingConfig
from flow_study.data import DataError, FlowDataset, NormalizationStats, load_all_splits
from flow_study.device import GPUInfo, choose_gpu
from flow_study.models import create_model
from flow_study.trainer import FlowTrainer

STATS = Path('study/datasets/normalization_stats.pt')
TRAIN, VAL, TEST = (Path(f'study/datasets/splits/1k/{k}.pt') for k in ('train', 'val', 'test'))


def change(path, **new):
    "Replace parts of a `.pt` file; those that are None are left out"
    d = {**torch.load(path), **new}
    torch.save({k: v for k, v in d.items() if v is not None}, path)


def rows(path): return torch.load(path)['embeddings']
def with_nan(x, row=3): return x.index_put((torch.tensor([row, row + 4]), torch.tensor([0, 0])), torch.tensor([float('nan'), float('inf')]))

BAD = { # what is done, and what the error says
    'wrong dimension': (lambda: change(VAL, embeddings=rows(VAL)[:, :16]), ('val.pt has vectors of 16 numbers', '32')),
    'wrong dimension of all': (lambda: [change(p, embeddings=rows(p)[:, :16]) for p in (TRAIN, VAL, TEST)], ('train.pt has vectors of 16 numbers', 'have 32')),
    'wrong dimension of the stats': (lambda: change(STATS, mean=torch.zeros(16), std=torch.ones(16)), ('vectors of 32 numbers', '(1k_train) have 16')),
    'wrong rank 1': (lambda: change(TRAIN, embeddings=rows(TRAIN)[0], instructions=None, indices=None), ('train.pt', 'shape (32,), expected (n, d)')),
    'wrong rank 3': (lambda: change(TRAIN, embeddings=rows(TRAIN)[None]), ('train.pt', 'shape (1, 800, 32), expected (n, d)')),
    'wrong rank of the stats': (lambda: change(STATS, mean=torch.zeros(1, 32)), ('mean (1, 32) and std (32,), expected (d,)',)),
    'no table': (lambda: change(TRAIN, embeddings=['a', 'b']), ('train.pt is list, expected a table of numbers',)),
    'None': (lambda: torch.save({'embeddings': None}, TRAIN), ('train.pt is NoneType, expected a table',)),
    'no dict': (lambda: torch.save(torch.zeros(3, 32), TRAIN), ('train.pt holds Tensor, expected a dict', 'flow_study_data')),
    'no embeddings': (lambda: change(TRAIN, embeddings=None), ("train.pt lacks 'embeddings'; found", 'indices')),
    'empty split': (lambda: change(VAL, embeddings=torch.zeros(0, 32)), ('val.pt', 'shape (0, 32)', 'n >= 1')),
    'empty file': (lambda: TEST.write_bytes(b''), ('test.pt is refused: it is damaged', 'flow_study_data')),
    'too few texts': (lambda: change(TRAIN, instructions=['one']), ('800 rows but 1 instructions',)),
    'NaN rows': (lambda: change(TRAIN, embeddings=with_nan(rows(TRAIN))), ('train.pt has NaN or infinite numbers in 2 of 800 rows (rows 3, 7)',)),
    'float64 beyond float32': (lambda: change(TRAIN, embeddings=rows(TRAIN).double()*1e300), ('NaN or infinite numbers in 800 of 800 rows',)),
    'complex': (lambda: change(TRAIN, embeddings=rows(TRAIN)*1j), ('torch.complex64, expected float32',)),
    'zero in the stats': (lambda: change(STATS, std=torch.ones(32).index_fill(0, torch.tensor(5), 0)), ('std must be above 0', '[5]')),
    'NaN in the stats': (lambda: change(STATS, mean=torch.full((32,), float('nan'))), ('all finite',)),
    'text in the stats': (lambda: change(STATS, mean='zero'), ('mean and std are not tensors of numbers',)),
    'stats without std': (lambda: torch.save({'mean': torch.zeros(32), 1: 2}, STATS), ('lack std; found mean, 1',)),
    'missing stats': (lambda: STATS.unlink(), ("stats_path='study/datasets/normalization_stats.pt'", '`flow_study_data --data-dir study/datasets`')),
    'missing split': (lambda: TEST.unlink(), ('test.pt does not exist', '`flow_study_data --data-dir study/datasets`')),
    'missing size': (lambda: TRAIN.parent.rename('study/datasets/splits/5k'), ('train.pt does not exist', 'Sizes found in study/datasets/splits: 5k')),
}


@pytest.mark.parametrize('how, said', BAD.values(), ids=BAD)
def test_bad_data(how, said, train_main):
    "wrong dimension or rank, empty split, ... NaN rows, ... missing stats, missing split"
    how()
    before = files('study')
    code, out, err = train_main(*OPTIONS)
    assert code == (2 if 'missing stats' in err or 'stats_path' in err else 1) and one_line(err)
    for text in said: assert text in err
    assert files('study') == before


def test_batch_larger_than_the_split(train_main):
    "batch larger than the split with drop_last"
    code, out, err = train_main(*OPTIONS, '--batch-size', '801')
    assert code == 1 and one_line(err) and 'batch_size=801' in err and 'the 800 rows' in err and '--batch-size 800' in err
    assert not RUN.exists()
    assert train_main(*OPTIONS, '--batch-size', '800', '--epochs', '1')[0] == 0


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8], ids=str)
def test_other_number_types(dtype, train_main):
    "float64 or int data: a stated cast"
    for p in (TRAIN, VAL, TEST): change(p, embeddings=(rows(p)*10).clamp(-100, 100).to(dtype))
    code, out, err = train_main(*OPTIONS, '--epochs', '1')
    assert (code, err) == (0, '')
    for p in (TRAIN, VAL, TEST): assert f'split {p} is {dtype} and is cast to float32' in out


def test_zero_variance_column(place, caplog):
    "zero-variance column"
    x = torch.randn(500, 8)
    x[:, 3] = 0.1
    with caplog.at_level('WARNING', 'flow_study'): stats = NormalizationStats.fit(x)
    assert caplog.messages == ['1 dimensions never change and keep a scale of 1'] and stats.std[3] == 1
    assert FlowDataset.from_tensor(x, stats).x.isfinite().all()


def test_network_of_another_width(place):
    "wrong dimension: of the network"
    config = TrainingConfig(arch='simple', flow='icfm', dataset='1k', group='faults')
    train, val, _ = load_all_splits('1k')
    with pytest.raises(DataError, match='does not take rows of 32 numbers'): FlowTrainer(create_model('simple', 16), config, train, val, 'cpu', trackers=[]).train()
    assert not RUN.exists()


# Names

@pytest.mark.parametrize('name', ['../up', '..', '.', 'a/b', '/tmp/x', 'a\\b', '.hidden', ' outer', '', 'x'*300, 'ü'*150, 'a\nb', 'a\0b', 'a\u202eb', 'a\udc80b'], ids=ascii)
@pytest.mark.parametrize('field', ['name', 'arch', 'flow', 'dataset', 'aug'])
def test_run_name_refused(field, name, train_main):
    "run name with `/`, `..`, NUL, 300 characters, unicode"
    if (field, name) == ('name', ''): pytest.skip('an empty name is the default name')
    before = sorted(Path('.').rglob('*'))
    code, out, err = train_main(*OPTIONS, f'--{field}', name)
    assert code == 2 and one_line(err) and f'{field}=' in err and 'printable text without' in err
    Path('run.json').write_text(json.dumps({**dict(arch='simple', flow='icfm', dataset='1k', group='g'), field: name}))
    code, out, err = train_main('--config', 'run.json')
    assert code == 2 and one_line(err) and f'{field}=' in err
    Path('run.json').unlink()
    assert sorted(Path('.').rglob('*')) == before


@pytest.mark.parametrize('name', ['Übung 1', '流れ', 'x'*200, 'a..b', '--resume'], ids=ascii)
def test_run_name_accepted(name, train_main):
    "run name with ... unicode: stays inside the checkpoint folder"
    assert train_main(*OPTIONS, '--epochs', '1', f'--name={name}')[0] == 0
    assert train_main(*OPTIONS, '--epochs', '1', f'--name={name}')[0] == 0
    assert sorted(p.name for p in RUN.parent.iterdir()) == sorted([name, f'{name}.archived-1'])
    assert train_main(f'--resume={name}', '--epochs', '2')[0] == 0


@pytest.mark.parametrize('path', ['x'*300, 'a\0b', '../nothing', ''], ids=ascii)
def test_resume_of_nothing(path, train_main):
    "run name with ...: as something to resume"
    code, out, err = train_main('--resume', path)
    assert code in (1, 2) and one_line(err) and not RUN.parent.exists()


def test_folder_with_nul(train_main):
    "run name with ... NUL: nor may a folder have one"
    for option in ('--data-dir', '--checkpoint-dir', '--stats-path', '--config'):
        code, out, err = train_main(*OPTIONS, option, 'a\0b')
        assert code == 2 and one_line(err) and option.strip('-').replace('-', '_') in err


# Options

@pytest.mark.parametrize('options, said', [
    ('--batch_sise 3', "unknown option '--batch-sise'. Did you mean '--batch-size'?"), ('--epoch 3', "Did you mean '--epochs'?"),
    ('--arch simpel', "unknown arch 'simpel'. Did you mean 'simple'?"), ('--flow icmf', "unknown flow 'icmf'. Did you mean 'icfm'?"),
    ('--aug mixpu', "unknown augmentation 'mixpu'. Did you mean 'mixup'?"), ('--device cdua', "unknown value 'cdua'. Did you mean 'cuda'?"),
    ('--wandb-mode ofline', "Did you mean 'offline'?"), ('--lr high', "invalid float value: 'high'"), ('--epochs 1.5', "invalid int value: '1.5'"),
    ('--lr nan', 'lr=nan: expected above 0 and below 10'), ('--epochs 0', 'epochs=0: expected at least 1'), ('--ema-decay 1', 'ema_decay=1.0: expected from 0'),
    ('--seed -1', 'seed=-1: expected an integer from 0'), ('--gpu one', "gpu='one': expected the number of one GPU"), ('extra', "unexpected argument 'extra'")])
def test_misspelt_option(options, said, train_main):
    "unknown or misspelt config key or CLI value"
    device = () if '--gpu' not in options else ('--device', 'auto')
    code, out, err = train_main(*OPTIONS, *device, *options.split())
    assert code == 2 and one_line(err) and said in err and not RUN.parent.exists()


@pytest.mark.parametrize('given, said', [
    ({'bach_size': 3}, "unknown config field 'bach_size'. Did you mean 'batch_size'?"), ({'Epochs': 3}, "Did you mean 'epochs'?"),
    ({'epochs': '3'}, "epochs='3': expected int, not str"), ({'epochs': True}, 'epochs=True: expected int, not bool'), ({'lr': None}, 'lr=None: expected float'),
    ({'flow': ['icfm']}, "expected str, not list"), ({'seed': 'x'}, "seed='x': expected"), 
    ({'data_dir': 3}, 'data_dir=3: expected str')])
def test_misspelt_config_key(given, said, train_main):
    "unknown or misspelt config key"
    Path('run.json').write_text(json.dumps({**dict(arch='simple', flow='icfm', dataset='1k', group='g'), **given}))
    code, out, err = train_main('--config', 'run.json', '--device', 'cpu')
    assert code == 2 and one_line(err) and said in err and not RUN.parent.exists()


def test_config_file_is_no_config(train_main):
    "unknown ... config: a file that is none"
    for text, said in (('{"arch": ', 'a readable JSON file'), ('[1]', 'a JSON object of config fields'), ('{}', 'config without arch, flow, dataset, group')):
        Path('run.json').write_text(text)
        code, out, err = train_main('--config', 'run.json', '--device', 'cpu')
        assert code == 2 and one_line(err) and said in err


# GPUs

TWO = [GPUInfo(0, '00000000:01:00.0', 'NVIDIA L40S', 'GPU-aaaa'), GPUInfo(1, '00000000:02:00.0', 'NVIDIA RTX A5000', 'GPU-bbbb')]


@pytest.mark.parametrize('value, gpus, gpu, visible, used', [
    (None, TWO, 1, '1', '1 = NVIDIA RTX A5000'),                       # unset: GPU 1
    (None, TWO, 'GPU-bbbb', 'GPU-bbbb', '1 = NVIDIA RTX A5000'),
    (None, TWO[:1], 1, '0', '0 = NVIDIA L40S, the only GPU here'),
    (None, [], 1, '1', 'only CUDA can check'),                         # no driver
    ('', TWO, 1, '', 'no GPU, this value hides all of them'),          # empty
    ('-1', TWO, 1, '-1', 'no GPU, this value hides all of them'),
    ('7', TWO, 1, '7', 'no GPU, CUDA finds none under this value'),    # out of range
    ('0,7,1', TWO, 1, '0,7,1', "CUDA stops at '7'"),
    ('1', TWO[:1], 1, '1', 'no GPU, CUDA finds none under this value'),
    ('GPU-bb', TWO, 1, 'GPU-bb', '1 = NVIDIA RTX A5000'),              # a UUID
    ('GPU-zz', TWO, 1, 'GPU-zz', 'no GPU'),
    ('0', [], 1, '0', 'whatever CUDA finds under this value')])
def test_visible_devices(value, gpus, gpu, visible, used):
    "`CUDA_VISIBLE_DEVICES` unset, empty, out of range, a UUID; no driver"
    environ = {} if value is None else {'CUDA_VISIBLE_DEVICES': value}
    choice = choose_gpu(gpu, environ, gpus)
    assert environ['CUDA_VISIBLE_DEVICES'] == choice.visible == visible
    asked, found, said = (part.partition(': ')[2] for part in choice.message.split('; '))
    assert asked == (f'CUDA_VISIBLE_DEVICES={value!r}, set before and kept' if value is not None else f'GPU {gpu}' if gpu == 1 else gpu)
    assert found == (', '.join(map(str, gpus)) or 'no GPU (no NVIDIA driver, or no access to it)')
    assert used in said and '\n' not in choice.message


def test_gpu_that_is_not_there():
    "`CUDA_VISIBLE_DEVICES` ... out of range: a GPU that was asked for and is not there"
    with pytest.raises(ValueError, match=r'gpu=7: expected one of the GPUs of this machine: 0 = NVIDIA L40S, 1 = NVIDIA RTX A5000'): choose_gpu(7, {}, TWO)
    with pytest.raises(ValueError, match='gpu='): choose_gpu('GPU-zz', {}, TWO)


@pytest.mark.parametrize('value, asked', [(None, 'GPU 1'), ('', "CUDA_VISIBLE_DEVICES='', set before and kept"), ('7', "CUDA_VISIBLE_DEVICES='7', set before and kept")])
def test_the_script_says_which_gpu(value, asked, script):
    "`CUDA_VISIBLE_DEVICES` ...: a plain line says what was asked, what was found, what is used"
    p = script(*OPTIONS, '--device', 'auto', '--epochs', '1', CUDA_VISIBLE_DEVICES=value)
    code, out, err = p.end()
    first = out.splitlines()[0].split('; ')
    assert (code, err, first[0]) == (0, '', f'asked: {asked}') and first[1].startswith('found: ') and first[2].startswith('used: ')
    if value is not None: assert 'no GPU' in out and 'training runs on the CPU' in out
