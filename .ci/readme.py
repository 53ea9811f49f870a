"""Make `README.md` from `nbs/index.ipynb` without Quarto.

`python .ci/readme.py` writes it, `--check` prints a diff and exits 1 when it is out of step, and `--command NAME` prints
the command that the README shows below `<!-- ci: NAME -->`, so that what is tested is what the reader is told to type.
"""
import argparse, difflib, json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ANSI = re.compile(r'\x1b\[[0-9;]*[A-Za-z]')
# Pictures and notebooks lie beside index.ipynb, one folder below the README.
RELATIVE = re.compile(r'(\]\(|src=")(images/|[\w-]+\.ipynb)')


def text_of(value):
    "A notebook stores text as one string or as a list of lines"
    return value if isinstance(value, str) else ''.join(value)


def markdown_cell(cell):
    "The cell as it is, without YAML front matter and with links that hold one folder up"
    text = re.sub(r'\A---\n.*?\n---\n', '', text_of(cell['source']), flags=re.S)
    return RELATIVE.sub(r'\1nbs/\2', text).strip('\n')


def directives(source):
    "The `#|` lines of a code cell as `{name: value}`; a directive without a value has the empty one"
    found = re.findall(r'^#\|\s*(\w+):?[ \t]*(.*?)\s*$', source, flags=re.M)
    return {name: value.lower() for name, value in found}


def output_block(output):
    "The README's form of one output: Markdown as it is, text indented by four spaces, progress on stderr dropped"
    if output['output_type'] == 'stream':
        text = '' if output['name'] == 'stderr' else text_of(output['text'])
    else:
        data = output.get('data', {})
        if any(kind.startswith('image/') for kind in data):
            raise SystemExit('index.ipynb: a cell has a picture as output. Save it in nbs/images and link to it')
        if 'text/markdown' in data: return text_of(data['text/markdown']).strip('\n')
        text = text_of(data.get('text/plain', ''))
    lines = ANSI.sub('', text).rstrip().splitlines()
    return '\n'.join('    ' + line if line else '' for line in lines)


def code_cell(cell):
    "The code in a fence, unless it is not to be shown, and its outputs below"
    source = text_of(cell['source'])
    flags = directives(source)
    if 'hide' in flags or flags.get('include') == 'false': return ''
    code = re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip('\n')
    shown = [] if flags.get('echo') == 'false' or not code else [f'```python\n{code}\n```']
    return '\n\n'.join(filter(None, [*shown, *map(output_block, cell.get('outputs', []))]))


def readme(notebook):
    "The text of the README for the notebook at this path"
    make = {'markdown': markdown_cell, 'code': code_cell}
    cells = json.loads(Path(notebook).read_text(encoding='utf-8'))['cells']
    blocks = [make[cell['cell_type']](cell) for cell in cells if cell['cell_type'] in make]
    return '\n\n'.join(filter(None, blocks)) + '\n'


def command(text, name):
    "The one command in the `sh` fence below `<!-- ci: name -->`"
    found = re.findall(rf'<!-- ci: {re.escape(name)} -->\s*```sh\n(.*?)\n```', text, flags=re.S)
    if len(found) == 1 and '\n' not in found[0]: return found[0]
    raise SystemExit(f'README.md: expected a single line in one sh fence below <!-- ci: {name} -->, found {found}')


def check(path, wanted):
    "Exit code 1, after a diff, when the file is not what the notebook makes"
    found = path.read_text(encoding='utf-8') if path.exists() else ''
    if found == wanted: return 0
    lines = found.splitlines(True), wanted.splitlines(True)
    sys.stdout.writelines(difflib.unified_diff(*lines, 'README.md', 'nbs/index.ipynb'))
    print('README.md is out of step with nbs/index.ipynb: run `python .ci/readme.py`')
    return 1


def main(argv=None):
    "The command line; returns the exit code"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--root', type=Path, default=ROOT, help='the project (default: this one)')
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--check', action='store_true', help='compare only, exit 1 with a diff')
    what.add_argument('--command', metavar='NAME', help='print the command below <!-- ci: NAME -->')
    args = parser.parse_args(argv)
    path = args.root/'README.md'
    if args.command:
        print(command(path.read_text(encoding='utf-8'), args.command))
        return 0
    wanted = readme(args.root/'nbs'/'index.ipynb')
    if args.check: return check(path, wanted)
    path.write_text(wanted, encoding='utf-8')
    return 0


if __name__ == '__main__': sys.exit(main())
