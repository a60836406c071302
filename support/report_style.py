"""How a run's page looks, and the one script in it: a slider over the steps."""

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#5c6670;--line:#d8dde3;--card:#f6f8fa;
--c0:#2563a8;--c1:#c2571a;--c2:#2f8a4c;--c3:#8250a8;--c4:#a8862b;--c5:#b0385a;--plus:#d5f0dc;--minus:#f9d9d6}
@media(prefers-color-scheme:dark){:root{
--bg:#14181d;--fg:#e3e7eb;--soft:#9aa5b1;--line:#343c46;--card:#1d232a;
--c0:#6aa9ea;--c1:#e98d55;--c2:#68c184;--c3:#b891dc;--c4:#d8b45a;--c5:#e57d9b;--plus:#1f4a2c;--minus:#5a2724}}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:20px 24px 60px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:36px 0 6px}h3{margin:18px 0 0;font-size:16px}
p{margin:4px 0 10px;max-width:80ch;color:var(--soft)}
.tiles{display:flex;flex-wrap:wrap;gap:10px}.tile{background:var(--card);padding:8px 14px;border-radius:6px}
.tile b{display:block;font-size:19px}.tile span{color:var(--soft);font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(310px,1fr));gap:18px}
figure{margin:0}figcaption{font-weight:600;font-size:14px}.narrow{max-width:260px}
svg{width:100%;height:auto;display:block}svg.small{max-width:240px}
svg text{font-size:10.5px;fill:var(--soft)}.grid{stroke:var(--line);fill:none;stroke-width:1}
.line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}.faint{opacity:.28;stroke-width:1}
.dot{fill:var(--c)}.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}
.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.keys{font-size:12.5px;margin:0}.key{margin-right:12px}
.key:before{content:"";display:inline-block;width:14px;height:3px;background:var(--c);margin:0 5px 3px 0}
table{border-collapse:collapse;margin:8px 0;font-size:13.5px}
th,td{text-align:left;vertical-align:top;padding:5px 14px 5px 0;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft)}summary{cursor:pointer;color:var(--soft);font-size:12.5px}
.answers,.stages{width:100%;table-layout:fixed}
.answers th:last-child{width:90px}.answers th:first-child{width:24%}
.text{unicode-bidi:isolate;overflow-wrap:anywhere;white-space:pre-wrap}
mark{background:var(--plus);color:inherit;border-radius:2px}small{display:block;color:var(--soft)}
.plus{background:var(--plus)}.minus{background:var(--minus)}.plus,.minus{border-radius:3px;padding:0 2px}
.group{display:flex;gap:6px;margin:8px 0}.group>svg{flex:none;width:78px}.rows{flex:1;min-width:0}
.row{display:flex;gap:10px;height:46px;align-items:center;border-bottom:1px solid var(--line);
box-sizing:border-box}
.row .bar{flex:none;width:110px;height:9px;background:var(--card);border-radius:5px;overflow:hidden}
.row .bar i{display:block;height:100%;background:var(--c0)}.row .p{width:34px;color:var(--soft)}
.row .answer{flex:1;min-width:0;max-height:42px;overflow:hidden;font-size:13.5px;line-height:1.45;
display:flex;gap:12px;justify-content:space-between}.row small{white-space:nowrap}
pre{background:var(--card);padding:10px 12px;border-radius:6px}.slider{display:block;margin:6px 0 12px}
.slider input{width:340px;vertical-align:middle}.js .step:not(.now){display:none}
"""

SCRIPT = """
document.querySelectorAll('.slider').forEach(function(label){
  var steps=[],next=label.nextElementSibling;
  while(next&&next.className.indexOf('step')===0){steps.push(next);next=next.nextElementSibling}
  var input=label.querySelector('input'),shown=label.querySelector('output');
  function show(){steps.forEach(function(one,i){one.className=i==input.value?'step now':'step'});
    shown.textContent=steps[input.value].getAttribute('data-step')}
  input.addEventListener('input',show);input.value=steps.length-1;show()});
document.documentElement.className='js';
"""
