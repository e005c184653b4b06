#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Records what Jinja2 makes of chat templates and of small pieces of the language, for
tests/io/chat_template_test.cpp.

Reads tests/data/chat/templates/*.jinja, writes tests/data/chat/goldens.json. Needs jinja2 (recorded
with 3.1.6). Run from anywhere: python3 tests/oracle/make_chat_goldens.py

The environment is that of Transformers' apply_chat_template: sandboxed, trim_blocks, lstrip_blocks,
loop controls, its own tojson. smollm2.jinja is the template in SmolLM2-135M-Instruct's file; the
others are in the form in which their families publish them.
"""

import json
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

DATA = Path(__file__).resolve().parents[1] / "data" / "chat"

SYSTEM = {"role": "system", "content": "Be brief.\nAnd kind."}
DIALOGUES = {
    "one": [{"role": "user", "content": "Hello!"}],
    "system": [SYSTEM, {"role": "user", "content": "Hello!"}],
    "rounds": [
        SYSTEM,
        {"role": "user", "content": "  What is 2 < 3 & \"so\" on?  "},
        {"role": "assistant", "content": "\nTrue. \n"},
        {"role": "user", "content": "Gr\u00fc\u00dfe 😀 'x'"},
    ],
    "no system": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "<think>\nwell, d\n</think>\n\nd"},
    ],
    "thinking": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\n\nhm\n</think>\n\nb"},
        {"role": "user", "content": "c"},
    ],
    "twice": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "unknown role": [{"role": "wizard", "content": "a"}],
    "empty": [],
}

# Small templates, one feature each. They see messages ("rounds") and the variables below.
VARIABLES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "add_generation_prompt": True,
    "tools": None,
    "documents": None,
    "flag": True,
    "off": False,
    "count": 7,
    "name": "Zo\u00eb Smith",
    "text": " a b  c ",
}
SNIPPETS = [
    # output, literals, operators
    "{{ 1 }}{{ -2 }}{{ 3.5 }}{{ 1e3 }}{{ 1e16 }}{{ 1e-5 }}{{ 0.1 }}{{ 1_000 }}{{ 2.50 }}{{ 1e22 }}",
    "{{ 123456789.25 }} {{ 0.0001 }} {{ 100.0 }} {{ -0.5 }} {{ 1/3 }} {{ 7/2 }} {{ 4/2 }}",
    "{{ true }}{{ False }}{{ none }}{{ None }}{{ missing }}",
    "{{ 7 // 2 }} {{ -7 // 2 }} {{ 7 % 3 }} {{ -7 % 3 }} {{ 7 % -3 }} {{ 7.5 // 2 }} {{ -7.5 % 2 }}",
    "{{ 2 ** 10 }} {{ 2 ** -1 }} {{ 2 ** 3 ** 2 }} {{ -2 ** 2 }} {{ 2 + 3 * 4 }} {{ (2 + 3) * 4 }}",
    "{{ 1 - 2 - 3 }} {{ 2 * 3 % 4 }} {{ 'a' ~ 1 ~ none ~ true }} {{ 'a' + 'b' * 3 }} {{ 3 * 'x' }}",
    "{{ 1 + true }} {{ true == 1 }} {{ 1 == 1.0 }} {{ '1' == 1 }} {{ none == false }}",
    "{{ 'a' 'b' \"c\" }} {{ 'it\\'s' }} {{ \"tab\\t|nl\\n|q\\\"\" }} {{ '\\u00e9\\x41\\U0001F600\\101' }}",
    "{{ '\\q\\/' }} {{ 'a\\\\b' }}",
    "{{ [1, 'a', none, true, 2.0] }} {{ ('a',) }} {{ (1, 2) }} {{ () }} {{ [] }} {{ {} }}",
    "{{ {'a': 1, 'b': [1, {'c': 'd'}]} }} {{ ['it\\'s', '\"', 'b\\\\', 'n\\n'] }}",
    "{{ {'a': {'b': 'deep'}}.a.b }} {{ {'a': 1}['a'] }} {{ {'a': 1}.missing }}|",
    "{{ 'x' if flag else 'y' }}{{ 'x' if off else 'y' }}{{ 'x' if off }}|",
    "{{ 1 if off else 2 if off else 3 }} {{ (1 if flag else 2) + 1 }}",
    "{{ flag and 'yes' }} {{ off or 'no' }} {{ '' or 0 or 'last' }} {{ not off }} {{ not not flag }}",
    "{{ 1 < 2 < 3 }} {{ 1 < 3 < 2 }} {{ 3 > 2 >= 2 }} {{ 'a' < 'b' }} {{ [1, 2] < [1, 3] }} {{ 1 != 2 }}",
    "{{ 'a' in 'cat' }} {{ 'a' not in ['b'] }} {{ 'role' in messages[0] }} {{ 2 in [1, 2] }} {{ '' in 'x' }}",
    "{{ not 'a' in 'b' }} {{ not (off or flag) }}",
    # subscripts and slices
    "{{ messages[0].role }} {{ messages[-1]['role'] }} {{ messages[9] }}| {{ messages.0.role }}",
    "{{ name[0] }}{{ name[-1] }}{{ name[2] }}{{ name[99] }}| {{ name[:3] }} {{ name[2:] }} {{ name[::-1] }}",
    "{{ name[1:-1:2] }} {{ [1,2,3,4][1:3] }} {{ [1,2,3,4][::2] }} {{ [1,2,3][::-1] }} {{ [1,2,3][5:] }}",
    "{{ [1,2,3,4,5][-3:-1] }} {{ [1,2,3][-99:2] }} {{ [1,2,3][3:0:-1] }} {{ 'abc'[none:2] }} {{ [1,2][-5::-1] }}",
    "{{ messages[1:]|length }} {{ messages[:-1]|length }} {{ messages[::-1][0].role }}",
    # statements
    "{% if off %}a{% elif flag %}b{% else %}c{% endif %}",
    "{% if off %}a{% elif off %}b{% else %}c{% endif %}{% if '' %}x{% endif %}{% if [] %}x{% endif %}",
    "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ loop.last }}{{ loop.length }}:{{ m.role }};{% endfor %}",
    "{% for x in [] %}x{% else %}none{% endfor %}{% for x in missing %}x{% else %}none{% endfor %}",
    "{% for x in [1,2,3,4] if x is even %}{{ x }}{{ loop.index }}{{ loop.last }}{% endfor %}",
    "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }},{% endfor %}{% for k in {'a': 1} %}{{ k }}{% endfor %}",
    "{% for a, b in [[1, 2], (3, 4)] %}{{ a + b }} {% endfor %}{% for (a, b) in [(1, 2)] %}{{ b }}{% endfor %}",
    "{% for c in 'h\u00e9!' %}<{{ c }}>{% endfor %}{% for i in range(3) %}{{ i }}{% endfor %}{{ range(1, 10, 4)|list }}",
    "{% for i in range(5, 0, -2) %}{{ i }}{% endfor %}{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% for i in [1,2,3] %}{{ loop.previtem }}|{{ loop.nextitem }};{{ loop.cycle('a', 'b') }}{% endfor %}",
    "{% for i in [1,2] %}{% for j in [1,2] %}{{ i }}{{ j }}{{ loop.index }} {% endfor %}{{ loop.index }}{% endfor %}",
    "{% set x = 1 %}{% for i in [1,2] %}{% set x = x + i %}{{ x }}{% endfor %}{{ x }}",
    "{% set ns = namespace(n=0, s='') %}{% for i in [1,2,3] %}{% set ns.n = ns.n + i %}{% set ns.s = ns.s ~ i %}{% endfor %}{{ ns.n }}{{ ns.s }}{{ ns.missing }}|",
    "{% set ns = namespace() %}{% set ns.a = 1 %}{{ ns.a }}{{ ns.a is defined }}{{ ns.b is defined }}",
    "{% set a, b = 1, 'two' %}{{ a }}{{ b }}{% set t = 1, 2 %}{{ t }}{% set (c, d) = (3, 4) %}{{ d }}",
    "{% set x %}block {{ count }}{% endset %}[{{ x }}]{{ x|length }}",
    "{% if flag %}{% set y = 5 %}{% endif %}{{ y }}{% if off %}{% set z = 5 %}{% endif %}{{ z }}|",
    "{% generation %}inside {{ count }}{% endgeneration %} after",
    "{% set messages = messages[1:] %}{{ messages[0].role }}{{ messages|length }}",
    # white space
    "  {% if flag %}\n  a\n  {% endif %}\n  b\n",
    "x  {%- if flag -%}  \n y \n  {%- endif -%}  z",
    "x {{- ' a ' -}} y {{ 'b' }}\nz {{ 'c' -}}  \n w",
    "a\n{% if flag %}\n\nb\n{% endif %}\n\nc",
    "a\n  {%+ if flag %}b{% endif +%}\nc",
    "a {# comment #} b {#- tight -#} c\n{# line #}\nd",
    "   {# only #}\n   {% set x = 1 %}   \n{{ x }}\n\n",
    "{% raw %}{{ not }} {% parsed %}{% endraw %}|{%- raw -%}  x  {%- endraw -%}  y",
    "a\r\nb\rc\n{{ 'd' }}\r\n",
    "{{ {'a': {'b': 1}}['a'] }}{{ '}}' }}{{ \"%}\" }}",
    "line\n    {{ 'kept' }}\n    {% if flag %}x{% endif %}\n",
    "{%if flag%}a{%endif%}{{flag}}{%-if flag-%} b {%-endif-%}",
    "\n\n{% if flag %}\t{% endif %}\t\n\n",
    "{{ 1 }}  {% if flag %}  {{ 2 }}  {% endif %}  {{ 3 }}",
    # filters
    "[{{ text|trim }}] [{{ text|trim|upper }}] [{{ 'xxaxx'|trim('x') }}] {{ text|length }} {{ messages|count }}",
    "{{ 'h\u00c9LLO w\u00f6rld'|lower }} {{ '\u00e9a'|upper }} {{ 'hELLO wORLD'|capitalize }} {{ \"it's a-b (c) d\"|title }}",
    "{{ missing|default('d') }} {{ none|default('d') }} {{ ''|default('d', true) }} {{ 0|d('z', boolean=true) }} {{ missing|default }}|",
    "{{ [1, 2, 3]|join }} {{ [1, 'a', none]|join(', ') }} {{ messages|join('/', attribute='role') }} {{ 'abc'|join('-') }}",
    "{{ [1, 2]|first }} {{ [1, 2]|last }} {{ []|first }}| {{ 'abc'|last }} {{ messages|map(attribute='role')|list }}",
    "{{ [1, 2]|map('string')|join('-') }} {{ ['a', 'B']|map('upper')|join }} {{ [[1], [2]]|map('first')|list }}",
    "{{ messages|map(attribute='nope', default='?')|join }}",
    "{{ 'a b a'|replace('a', 'x') }} {{ 'aaa'|replace('a', 'b', 2) }} {{ 'abc'|list }} {{ 'abc'|reverse }} {{ [1, 2]|reverse|list }}",
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }} {{ messages|rejectattr('role', 'eq', 'user')|map(attribute='role')|join(',') }}",
    "{{ [1, 2, 3]|select('odd')|list }} {{ [0, 1, '']|select|list }} {{ [1, 2]|reject('equalto', 1)|list }} {{ messages|selectattr('nope')|list }}",
    "{{ ['a', 'b']|select('in', ['b'])|list }} {{ [{'a': {'b': 1}}]|map(attribute='a.b')|list }}",
    "{{ {'a': 1}|items|list }} {{ {'b': 2, 'a': 1}.keys()|list }} {{ {'b': 2}.values()|list }} {{ missing|items|list }}",
    "{{ '42'|int }} {{ 'x'|int }} {{ '3.7'|int }} {{ 3.9|int }} {{ -3.9|int }} {{ 'x'|int(5) }} {{ none|int }}",
    "{{ count|string + '!' }} {{ 'a'|safe }} {{ missing|length }} {{ {}|length }} {{ 'na\u00efve'|length }}",
    "{{ 'a\nb\n\nc'|indent }} {{ 'a\nb'|indent(2, true) }} {{ 'a\n\nb'|indent(width=1, blank=true) }}",
    "{{ -1|string }} {{ 'a' ~ 'b'|upper }} {{ ('a' ~ 'b')|upper }} {{ [3]|first + 1 }}",
    # tojson
    "{{ {'a': 1, 'b': [true, none, 1.5, 'q\"\\n\\t\u00e9<>&\\'']}|tojson }}",
    "{{ {'a': 1, 'b': [1, 2], 'c': {}, 'd': []}|tojson(indent=2) }}",
    "{{ 'x'|tojson }} {{ []|tojson }} {{ [[]]|tojson(indent=4) }} {{ 1e20|tojson }} {{ messages|tojson }}",
    "{{ '\\x00\\x1f\\x7f\\\\/'|tojson }} {{ 'a'|tojson(ensure_ascii=false) }}",
    # tests
    "{{ missing is defined }}{{ count is defined }}{{ missing is undefined }}{{ none is none }}{{ missing is none }}{{ tools is none }}",
    "{{ 'a' is string }}{{ 1 is string }}{{ 1 is number }}{{ 1.5 is number }}{{ true is number }}{{ 1 is integer }}{{ true is integer }}{{ 1.0 is float }}",
    "{{ {} is mapping }}{{ [] is mapping }}{{ [] is sequence }}{{ 'a' is sequence }}{{ {} is sequence }}{{ 1 is sequence }}{{ 'a' is iterable }}{{ 1 is iterable }}",
    "{{ true is true }}{{ 1 is true }}{{ false is false }}{{ true is boolean }}{{ 3 is odd }}{{ 3 is even }}{{ 9 is divisibleby 3 }}{{ 9 is divisibleby(2) }}",
    "{{ 1 is eq 1 }}{{ 1 is equalto(2) }}{{ 2 is gt 1 }}{{ 2 is lt(1) }}{{ 1 is in [1] }}{{ 1 is sameas 1 }}{{ 1 is ne 2 }}{{ 1 is ge 1 }}{{ 1 is le 0 }}",
    "{{ 'a' is not string }}{{ missing is not defined }}{{ not missing is defined }}{{ 'ab' is lower }}{{ 'AB' is upper }}{{ 'Ab' is lower }}{{ '1' is lower }}",
    "{{ namespace is defined }}{{ range is callable }}{{ raise_exception is defined }}{{ strftime_now is defined }}{{ missing is string or flag is true }}",
    "{{ 'x' if missing is defined and missing else 'y' }} {{ 'x' if messages[0].nope is defined else 'y' }}",
    # string methods
    "[{{ text.strip() }}][{{ text.lstrip() }}][{{ text.rstrip() }}][{{ 'xyax'.strip('xy') }}][{{ '\\u00a0\\u3000a\\x1f'.strip() }}]",
    "{{ name.startswith('Zo') }}{{ name.endswith(('x', 'th')) }}{{ name.startswith('') }}{{ 'abc'.endswith('d') }}",
    "{{ text.split() }} {{ 'a,b,,c'.split(',') }} {{ 'a,b,c'.split(',', 1) }} {{ ' a  b c '.split(none, 1) }} {{ ''.split() }} {{ ''.split(',') }}",
    "{{ '</think>x</think>y'.split('</think>')[-1] }} {{ 'a\nb\r\nc\n'.splitlines() }} {{ 'ab'.replace('', '-') }} {{ 'aXbX'.replace('X', 'y', 1) }}",
    "{{ 'hi there'.title() }} {{ \"it's\".title() }} {{ 'hELLO'.capitalize() }} {{ name.upper() }} {{ name.lower() }} {{ ', '.join(['a', 'b']) }}",
    "{{ 'na\u00efve'.find('v') }} {{ 'abc'.find('z') }} {{ 'banana'.count('an') }} {{ 'abc'.count('') }}",
    "{{ {'a': 1}.get('a') }} {{ {'a': 1}.get('b') }} {{ {'a': 1}.get('b', 'd') }} {{ messages[0].get('role') }}",
    "{{ 'A'.lower().upper().strip() }} {{ messages[0]['content'].split('\\n')[1] }} {{ messages[0].content.strip()[-1] }}",
    "{{ dict(a=1, b='x') }} {{ dict({'a': 1}, b=2)['b'] }}",
    # errors: the reference raises one too
    "{{ missing.attribute }}",
    "{{ missing['key'] }}",
    "{{ messages[0].nope.nope }}",
    "{{ 'a' + 1 }}",
    "{{ 1 + none }}",
    "{{ missing + 'a' }}",
    "{{ 1 / 0 }}",
    "{{ 1 // 0 }}",
    "{{ 1 < 'a' }}",
    "{{ missing < 1 }}",
    "{{ 'a' in 1 }}",
    "{{ missing() }}",
    "{{ strftime_now('%d') }}",
    "{{ count() }}",
    "{% for x in 1 %}{% endfor %}",
    "{% for a, b in [[1]] %}{% endfor %}",
    "{% set x.y = 1 %}",
    "{{ 'a'|nofilter }}",
    "{{ 'a' is notest }}",
    "{{ 'a'.nomethod() }}",
    "{{ raise_exception('said so') }}",
    "{{ [1, 2][::0] }}",
    "{{ range(1, 2, 0) }}",
    "{{ 'a'.split('') }}",
    "{{ namespace|tojson }}",
    "{{ missing|tojson }}",
    "{{ 'a'.startswith(1) }}",
    "{{ -'a' }}",
    "{% if flag %}",
    "{% endif %}",
    "{% for x in %}{% endfor %}",
    "{% nothing %}",
    "{{ 'open }}",
    "{{ (1 }}",
    "{{ 1 ) }}",
    "{{ }}",
    "{{ 1 2 }}",
    "{{ a b }}",
    "{# open",
    "{% raw %} open",
    "{{ [1, }}",
    "{{ 'a' is }}",
    "{{ 'a'| }}",
    "{% set = 1 %}",
    "{% break %}",
    "{{ x is defined is true }}",
    "{{ 1 ! 2 }}",
    "{{ f(a=1, 2) }}",
    "{{ $ }}",
    "{{ 'a' if }}",
    "{% for x in [1] %}{% endif %}{% endfor %}",
]


def environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            call = self.call_method("_body")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _body(self, caller):
            return caller()

    result = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    result.filters["tojson"] = tojson
    result.globals["raise_exception"] = raise_exception
    return result


ENVIRONMENT = environment()


def attempt(source, **variables):
    try:
        return {"text": ENVIRONMENT.from_string(source).render(**variables)}
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, AttributeError,
            SyntaxError) as error:
        return {"error": str(error)}


def main():
    cases = []
    for path in sorted((DATA / "templates").glob("*.jinja")):
        for name, messages in DIALOGUES.items():
            for prompt in (False, True):
                for thinking in (None, False) if path.stem == "qwen3" else (None,):
                    variables = {} if thinking is None else {"enable_thinking": thinking}
                    cases.append({
                        "template": path.stem,
                        "dialogue": name,
                        "add_generation_prompt": prompt,
                        "variables": variables,
                        **attempt(path.read_text(encoding="utf-8"), messages=messages,
                                  add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>",
                                  tools=None, documents=None, **variables),
                    })
    snippets = [
        {"source": source, **attempt(source, messages=DIALOGUES["rounds"], **VARIABLES)}
        for source in SNIPPETS
    ]
    content = {"dialogues": DIALOGUES, "cases": cases, "snippets": snippets}
    (DATA / "goldens.json").write_text(
        json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
