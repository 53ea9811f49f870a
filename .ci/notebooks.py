"""Run `nbdev_test` and count: it prints only "Success.", which does not say how many notebooks were tested."""
import os, subprocess, sys

FAILED = 'nbdev Tests Failed On The Following Notebooks:'


def partition(paths, skipped):
    "The names of the notebooks that `nbdev_test` runs, and of those it passes without running"
    names = {True: [], False: []}
    for path in sorted(paths): names[bool(skipped(path))].append(path.name)
    return names[False], names[True]


def skips(path):
    "Whether the front matter tells nbdev not to run the notebook"
    from fastcore.basics import str2bool
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    return str2bool(getattr(nb, 'frontmatter_', {}).get('skip_exec', False))


def stream(command, env):
    "Run a command, passing its output on line by line; the exit code and the lines"
    process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = []
    for line in process.stdout:
        print(line, end='', flush=True)
        lines.append(line.strip())
    return process.wait(), lines


def failures(code, lines, names):
    "The notebooks that failed; all of them when `nbdev_test` ended without a verdict"
    if code == 0 and 'Success.' in lines: return []
    listed = lines[lines.index(FAILED) + 1:] if FAILED in lines else []
    return [name for name in names if name in listed] or names


def main(args):
    "Run, count, and return the exit code, which is 0 only when every notebook ran and passed"
    from nbdev.doclinks import nbglob
    names, skipped = partition(nbglob(as_path=True), skips)
    # One thread each: nbdev_test already runs a notebook per processor.
    code, lines = stream(['nbdev_test', *args], {**os.environ, 'OMP_NUM_THREADS': '1'})
    failed = failures(code, lines, names)
    for name in skipped: print(f'not run (skip_exec): {name}')
    print(f'{len(names) - len(failed)} passed, {len(failed)} failed', flush=True)
    return 0 if names and not failed else code or 1


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
