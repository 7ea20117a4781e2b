// The editor of Cypher in the page of `featlas serve`: CodeMirror 6, made into one file by bundle.sh beside this.

import { acceptCompletion, autocompletion, closeBrackets, closeBracketsKeymap, completionKeymap } from "@codemirror/autocomplete";
import { defaultKeymap, history, historyKeymap } from "@codemirror/commands";
import { HighlightStyle, StreamLanguage, bracketMatching, syntaxHighlighting } from "@codemirror/language";
import { cypher } from "@codemirror/legacy-modes/mode/cypher";
import { EditorState, Prec } from "@codemirror/state";
import { EditorView, drawSelection, highlightSpecialChars, keymap, placeholder } from "@codemirror/view";
import { tags } from "@lezer/highlight";

// Colours are the page's, so that they follow its light and dark.
const colours = HighlightStyle.define([
  { tag: [tags.keyword, tags.operatorKeyword], color: "var(--code-keyword)", fontWeight: "600" },
  { tag: [tags.string, tags.special(tags.string)], color: "var(--code-string)" },
  { tag: [tags.comment, tags.lineComment], color: "var(--code-comment)", fontStyle: "italic" },
  { tag: [tags.number, tags.atom, tags.bool], color: "var(--code-number)" },
  { tag: [tags.definition(tags.variableName), tags.standard(tags.variableName), tags.function(tags.variableName)], color: "var(--code-function)" },
]);

/** What may stand where the cursor is: labels and types after a colon, properties after a dot, keywords elsewhere. */
function completing(words) {
  return (context) => {
    const found = context.matchBefore(/[:.$]?\w*$/);
    if (!found || (found.from === found.to && !context.explicit)) return null;
    const sign = /[:.$]/.test(found.text[0] || "") ? found.text[0] : "";
    const known = words()[sign || "word"] || [];
    return { from: found.from + sign.length, options: known, validFor: /^\w*$/ };
  };
}

/**
 * An editor inside `element`. `words()` gives what may be completed: {":": labels and types, ".": properties, "$": parameters, word: keywords},
 * each a list of CodeMirror's completions. Returns {text, setText, focus}.
 */
export function create(element, { text, onRun, onChange, words, hint }) {
  const run = { key: "Mod-Enter", run: () => (onRun(), true) };
  const view = new EditorView({
    parent: element,
    state: EditorState.create({
      doc: text,
      extensions: [
        Prec.highest(keymap.of([run, { key: "Tab", run: acceptCompletion }])),
        keymap.of([...closeBracketsKeymap, ...defaultKeymap, ...historyKeymap, ...completionKeymap]),
        history(), drawSelection(), highlightSpecialChars(), bracketMatching(), closeBrackets(), EditorView.lineWrapping, placeholder(hint),
        StreamLanguage.define(cypher), syntaxHighlighting(colours), autocompletion({ override: [completing(words)], icons: false }),
        EditorView.contentAttributes.of({ "aria-label": "Cypher", spellcheck: "false" }),
        EditorView.updateListener.of((update) => update.docChanged && onChange(update.state.doc.toString())),
      ],
    }),
  });
  return {
    text: () => view.state.doc.toString(),
    setText: (doc) => view.dispatch({ changes: { from: 0, to: view.state.doc.length, insert: doc }, selection: { anchor: doc.length } }),
    focus: () => view.focus(),
  };
}
