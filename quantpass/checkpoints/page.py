"""The HTML page of a checkpoint's report."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>quantpass: {{ report.path }}</title>
<style>
body { font: 14px/1.4 sans-serif; margin: 2em; } table { border-collapse: collapse; margin: 1em 0; }
td, th { border: 1px solid #ccc; padding: .3em .6em; text-align: left; vertical-align: top; }
.yes { background: #e7f6e7; } .no { background: #fbeaea; } .open { background: #fdf6e0; }
.number { text-align: right; }
</style></head><body>
<h1>{{ report.path }}</h1>
<p>{{ report.format }}; {{ report.mode }} mode{% if report.ranks > 1 %}, tensor parallel over {{ report.ranks }} ranks\
{% endif %}; quantpass {{ version }}</p>
<ul>{% for t in report.targets %}<li>{{ t }}: {{ report.summary(t) }}\
{% for gain in (report.gains or {}).get(t, ()) %}<br>{{ gain }}{% endfor %}</li>{% endfor %}</ul>
{% if not report.total %}<p>No quantized linear was found.</p>{% else %}
<table><tr>{% for h in report.headers %}<th>{{ h }}</th>{% endfor %}</tr>
{% for line in report.lines %}<tr><td>{{ loop.index }}</td><td>{{ line.name }}\
{% if line.count > 1 %} &times;{{ line.count }}{% endif %}</td><td>{{ line.scheme }}</td>
<td>{{ line.k }} &times; {{ line.n }}</td><td>{{ line.place }}</td>
{% for t in report.targets %}{% set v = line.verdicts[t] %}
<td class="{{ 'yes' if v.fused else 'no' if v.covered else 'open' }}">{{ v }}</td>{% endfor %}</tr>
{% endfor %}</table>
<h2>Weights, MiB on {{ 'each rank' if report.ranks > 1 else 'the chip' }}</h2>
<table><tr>{% for h in report.byte_headers %}<th>{{ h }}</th>{% endfor %}</tr>
{% for row in report.byte_rows() %}<tr>{% for cell in row %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for target, r, lines, nearest in report.reasons() %}{% if loop.first %}<h2>Why not</h2>{% endif %}
<p><b>{{ r.rule }}</b> on {{ target }} ({{ numbers(lines) }}): {{ r.fact }}; wanted {{ r.want }}.
{% if r.hint %} {{ r.hint }}.{% endif %}{% if nearest %} Legal: {{ nearest }}.{% endif %}
{% if r.doc %}<small>{{ r.doc }}</small>{% endif %}</p>{% endfor %}{% endif %}
{% for title, texts in (("Assumed", report.assumed), ("Kept as floats", report.floats), ("Notes", report.notes)) %}
{% if texts %}<h2>{{ title }}</h2><ul>{% for text in texts %}<li>{{ text }}</li>{% endfor %}</ul>{% endif %}
{% endfor %}</body></html>
"""
