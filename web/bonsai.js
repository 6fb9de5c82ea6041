// Opens nodes wide enough to read what they report and which file they load, and shows on a node the text of a report
// that has no picture; pictures the page shows by itself.
import { app } from '../../scripts/app.js'
import { ComfyWidgets } from '../../scripts/widgets.js'

const WIDTH = 420
const PICTURE = 340
const REPORTING = ['BonsaiModelInfo', 'CalibrateBitLinear', 'MeasureBitLinear', 'PatchToBitLinear',
  'RecoverBitLinear', 'SaveBonsaiModel']
const LOADING = ['LoadBonsaiModel', 'LoadBonsaiPack', 'LoadBonsaiTextEncoder']
const LAYERS = { PatchToBitLinear: 90 } // more height for the list of layers, of which the page shows three lines
const NAME = 'bonsai report'
const [LETTER, LINE] = [6.1, 14] // of such a text, in pixels

function show(node, text) {
  let widget = node.widgets?.find((known) => known.name === NAME)
  if (!widget) {
    widget = ComfyWidgets.STRING(node, NAME, ['STRING', { multiline: true }], app).widget
    widget.label = ' '
    widget.serialize = false // neither in the saved workflow
    widget.options.serialize = false // nor in the prompt
    widget.options.read_only = true
    const area = widget.element ?? widget.inputEl
    if (area) area.readOnly = true
  }
  widget.value = text
  const [width, height] = node.computeSize() // with room for two lines
  const letters = Math.floor((node.size[0] - 40) / LETTER)
  const lines = text.split('\n').reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / letters)), 0)
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height + Math.max(0, lines - 2) * LINE)])
}

// The HTML nodes shrink a picture until it fits into the node as it is.
function roomFor(node) {
  if (node.flags?.bonsaiGrown) return
  node.flags = { ...node.flags, bonsaiGrown: true }
  const [width, height] = node.computeSize()
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height + PICTURE)])
}

app.registerExtension({
  name: 'bonsai.reports',
  beforeRegisterNodeDef(type, definition) {
    if (!REPORTING.includes(definition.name)) return
    const onExecuted = type.prototype.onExecuted
    type.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments)
      if (output?.images) roomFor(this)
      else if (output?.text) show(this, [output.text].flat().join('\n'))
    }
  },
  nodeCreated(node) {
    const { comfyClass, size } = node
    if ([...REPORTING, ...LOADING].includes(comfyClass))
      node.setSize([Math.max(WIDTH, size[0]), size[1] + (LAYERS[comfyClass] ?? 0)])
  }
})
