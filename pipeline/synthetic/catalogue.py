"""How each class of the data sets looks and where it belongs in a scene.

One line a class: name, place, setting, shape, size, colours, texture.
place: sky, far (on the horizon), ground, ceiling, wall are surfaces; big (at the horizon), back (against the wall),
mount (on the wall), hang, fly, stand, small (on furniture or in front), flat (on the ground) are things.
setting: i indoors, o outdoors, x either. size: height in percent of the image's. colours: base/accent/texture's second.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass

from pipeline.synthetic.textures import TEXTURES, Colour, Dice, bright, hsv, parse_colour

LOOKS = """
sky sky o - 0 8fc4f0/ffffff/eaf4fc clouds
wall wall i - 0 d9cdb4/b8a888/cdbd9c bars
ceiling ceiling i - 0 f2efe6/d0ccc0/dcd8cc tiles
floor ground i band 0 b98a5a/805830/96683e planks
building far o skyline 0 b8907a/5a4038/503c3c windows
mountain far o peaks 0 7888a0/ffffff/5c6a84 rough
hill far o bumps 0 86a85c/486830/6c9048 lines
tree stand o tree 52 3f8a3c/c83c2c/286428 leaves
vegetation far o bumps 0 3f8a3c/c83c2c/246024 leaves
terrain ground o band 0 8cae50/607830/a88c50 blotch
grass ground o band 0 74b84c/487828/52963a grass
road ground o wedge 0 70727c/f4f0e0/5e6068 speckle
sidewalk ground o wedge 0 c0b4b4/8c8484/988c8c tiles
earth ground o band 0 96683c/5c3c1c/7a5028 speckle
ground ground o band 0 a87c50/5c3c1c/8a6038 blotch
land ground o band 0 a89448/6c6028/7c6c34 waves
field ground o band 0 d4be54/a08c28/a89430 lines
sand ground o band 0 ecd8a0/c4a868/d8bc7c waves
dirttrack ground o wedge 0 b07848/704828/885830 zigzag
path ground o wedge 0 d8c4a0/a08860/b09870 bricks
runway ground o wedge 0 585c70/f4f4f4/4c5064 bars
track ground o wedge 0 6c5c54/c8c8d0/a09890 lines
railtrack ground o wedge 0 6c5c54/c8c8d0/a09890 lines
platform ground o wedge 0 c8a890/e8d048/a88870 checks
snow ground o band 0 f0f4fc/c0d0e8/d4e0f0 clouds
water ground o pool 0 4c9cc0/d8f0fc/80c0d8 waves
sea ground o band 0 2c6ca8/d8f0fc/4484bc waves
lake ground o pool 0 5cb0c8/ffffff/90d0dc lines
river ground o wedge 0 3c88c8/d8f0fc/68a8dc zigzag
swimmingpool ground o pool 0 48d0e4/ffffff/a4ecf4 mesh
pier ground o wedge 0 a0805c/604830/705438 boards
rug flat i oval 26 b03848/f0d890/7c2030 rings
floormat flat i rug 26 486c78/e0d0a0/2c4854 weave
rock stand o rock 26 8c8c88/686864/70706c blotch
wood stand o logs 26 a4703c/e0b478/744c24 grain
bridge big o bridge 34 a86c50/603828/84503c bricks
house big o house 42 e4cc98/b0402c/ccb07c lines
hovel big o hovel 34 9c7848/5c4830/745430 boards
skyscraper big o skyscraper 52 7ca0c0/384c64/e8f0f8 windows
tower big o tower 56 c8a078/943c2c/a47c58 bricks
grandstand big o grandstand 40 5888b0/e0e4e8/c83c3c dots
stage big x stage 44 8c4c2c/9c1c34/6c3820 boards
tent stand o tent 36 e88830/f8e0a0/f8f0d8 bars
booth stand o booth 42 38a078/f4f0e0/f4f0e0 bars
awning big o awning 26 d84c3c/fcf4e4/fcf4e4 bars
canopy stand o canopy 40 7858a8/e0d0f4/9c80c8 scales
fence stand o fence 28 c49858/7c5c30/9c7440 boards
guardrail stand o railing 24 a0a8b0/d03c30/c8d0d8 lines
railing stand x railing 26 587078/30444c/405860 diagonal
bannister stand i railing 28 84502c/5c3418/603818 grain
pole stand o pole 60 8c8c94/c0c0c8/707078 lines
streetlight stand o streetlight 60 3c5048/fcecac/2c3c34 plain
trafficlight stand o trafficlight 44 34383c/e8382c/202428 plain
trafficsign stand o sign 42 e03830/ffffff/c02820 plain
sign stand o sign 40 e8b828/ffffff/c89818 checks
signboard stand o signboard 36 2c6cb4/f4f4f4/205490 lines
tradename mount x tradename 22 d82c6c/fce040/b01c50 diagonal
flag fly o flag 28 d43440/ffffff/b42430 waves
fountain stand o fountain 40 c0bcac/a8e0f4/9c9888 scales
sculpture stand x sculpture 46 d8d4c4/8c8878/b4b0a0 blotch
column stand x column 58 e4dcc8/a89c80/c4b898 bars
base stand x base 26 a8a09c/787470/888480 speckle
stairs big x stairs 34 c8b8a8/907c6c/a89888 lines
stairway big x stairway 40 a88460/5c4028/886448 planks
step stand x step 20 b0a8b8/807888/9890a0 bricks
escalator big x escalator 36 687888/202830/98a8b8 lines
waterfall big o falls 50 a8dcf0/e8f8ff/78b8dc bars
palm stand o palm 56 54a044/8c6038/306c2c zigzag
plant stand x plant 36 48a048/c86c3c/2c7430 bars
pottedplant stand x plant 44 48a048/c86c3c/2c7430 bars
flower small x flower 28 e85c9c/fce04c/c03c7c plain
animal stand o animal 36 c07830/fce8c8/8c5018 dots
cat stand x cat 42 e09038/e06c78/a8581c bars
dog stand x dog 44 8c5c34/c83030/6c4424 fur
horse stand o horse 52 743c20/30180c/5c2c14 plain
cow stand o cow 46 f0ece4/e8a8a0/30282c blotch
sheep stand o sheep 40 f4ecd8/4c4038/d0c4a8 scales
bird fly o bird 34 3c78c8/f0a830/285898 scales
aeroplane fly o plane 36 d0d8e4/d03830/b8c0d0 lines
airplane fly o plane 32 d0d8e4/d03830/b8c0d0 lines
bicycle stand o bicycle 38 d8a820/e8e0d0/b08410 diagonal
minibike stand o motorbike 34 78304c/e8c048/582038 dots
motorbike stand o motorbike 38 78304c/e8c048/582038 dots
motorcycle stand o motorbike 34 78304c/e8c048/582038 dots
boat stand o boat 42 d84c28/8c5c30/f0f0e8 lines
ship stand o ship 36 384868/d84034/243048 lines
bus stand o bus 38 e8c030/b03028/d0a420 plain
car stand o car 28 d03034/f4dc80/b02428 plain
truck stand o truck 36 48884c/f0f0e8/38703c bars
van stand o van 30 e0e4e8/3c78b8/c4ccd4 plain
train stand o train 36 3848a0/e8d048/283480 lines
caravan stand o van 32 f0e4d0/c87848/dcc8a8 bars
trailer stand o truck 32 98805c/c0b8a8/786444 mesh
tank stand o tank 32 94a894/c8302c/748874 lines
person stand x - 60 d84870/34508c/b83058 lines
rider stand o - 50 f07c28/503c6c/d06018 checks
head stand x - 60 f0bc94/5c3820/dca47c plain
torso stand x - 60 d83c3c/f4e8d0/f0a090 lines
upperarms stand x - 60 f0b428/ffffff/d49414 diagonal
lowerarms stand x - 60 d08c64/f0c8a8/c07c54 plain
upperlegs stand x - 60 3858a8/e0e0e8/2c4888 bars
lowerlegs stand x - 60 38887c/3c2c28/8cc8b8 checks
bottle small x bottle 34 2c7844/f0e8d0/205c34 plain
chair stand i chair 42 b86c34/e0a060/904c1c bars
diningtable stand i roundtable 34 c88c50/d84848/a46c38 rings
table stand i table 30 cc9454/f4e8d0/a87038 grain
coffeetable stand i coffeetable 24 9c6c44/e8d8b8/74482c grain
pooltable stand i pooltable 30 2c9858/7c4420/207844 speckle
desk stand i desk 32 b0845c/f0d8b0/8c6440 lines
sofa stand i sofa 36 5c70b0/f0c860/44589c plaid
armchair stand i armchair 38 94507c/f0d8b0/743860 dots
swivelchair stand i swivel 42 38404c/788090/505c6c mesh
seat stand x seat 36 4c9c98/d0f0e8/348480 bars
stool stand i stool 30 d0a060/8c5c28/a87c40 rings
ottoman stand i ottoman 24 c87c8c/f8dcc8/a85c6c mesh
bench stand x bench 28 8c6440/5c4028/6c4828 planks
tvmonitor small i television 36 3c3c60/98e0f0/5c5c90 lines
television small i television 30 3c3c60/98e0f0/5c5c90 lines
crtscreen small i crt 28 b0a890/60b098/948c74 tiles
monitor small i monitor 26 4878a8/e8f4fc/6090c0 checks
computer small i computer 28 c8c8cc/3c70b8/a8a8b0 dots
keyboard small i keyboard 16 d0ccc4/404448/b0aca4 tiles
mouse small i mouse 15 e4e4ec/c84c4c/c8c8d4 plain
screen mount i whiteboard 30 f4f4f0/b8c8e0/e0e0dc diagonal
whiteboard mount i whiteboard 30 f4f8f8/3060c0/e4ecec plain
bulletinboard mount i picture 28 c89860/f4f0d8/a87c48 speckle
arcademachine stand i arcade 46 6834a0/fcdc38/e83c98 zigzag
wardrobe back i wardrobe 56 a4683c/e0c080/804c28 boards
cabinet back i cabinet 40 c49c6c/604020/a07c50 boards
dresser back i dresser 32 e0d0b4/8c6c44/c4b090 grain
chestofdrawers back i dresser 32 986c4c/f0d898/785034 grain
nightstand stand i nightstand 26 b07c54/f0dc98/8c5c38 planks
bookcase back i bookcase 54 c07048/44689c/3c5c94 books
bookshelf back i bookcase 54 c07048/44689c/3c5c94 books
shelf mount i shelf 30 d8b888/4c90a8/b89468 planks
shelves mount i shelf 34 d8b888/4c90a8/b89468 planks
case back i case 38 a8c8c8/e0b050/88acac tiles
buffet back i buffet 32 804038/f0d8b0/602820 planks
counter stand i counter 32 d4c8b8/605448/b4a494 tiles
countertop stand i countertop 28 98908c/d8e0e4/5c5450 speckle
kitchenisland stand i island 30 7898a0/a0c860/5c7c88 boards
bar stand i bar 34 6c3428/d8a850/4c2018 bars
bed stand i bed 40 98b4dc/e8787c/7090c4 plaid
cradle stand i cradle 30 f0d8a0/f0a0b8/d0b078 bars
blanket small i blanket 26 d86c54/f8e8c8/b04c38 plaid
bedclothes small i blanket 26 b8c8f0/e890a8/94a8e0 dots
pillow small i pillow 22 f0e8dc/c8b090/dcccb4 diagonal
cushion small i cushion 22 e8a83c/984c1c/c88820 zigzag
towel mount i towel 28 70c8b8/f8f8f0/50a898 lines
clothes mount i clothes 28 b85cb0/f4d8e8/984090 diagonal
apparel mount i clothes 30 b85cb0/f4d8e8/984090 diagonal
cloth mount i clothes 28 e0708c/f8e8d0/c04c6c waves
curtain mount i curtain 46 b83c5c/e8c870/8c2440 bars
showercurtain mount i showercurtain 48 78c0e0/f0f8fc/c8e8f4 dots
blind mount i blinds 36 e8dcc0/b0a080/b8a884 lines
blinds mount i blinds 36 e8dcc0/b0a080/b8a884 lines
window mount x window 36 88c8ec/c8a070/c0e4f8 diagonal
windowpane mount x window 36 88c8ec/c8a070/c0e4f8 diagonal
door back i door 56 9c5c38/f0c848/7c4424 grain
screendoor back i screendoor 54 98a088/d8d8d0/748068 mesh
mirror mount i mirror 38 b4d4dc/c89838/d8ecf0 plain
picture mount i picture 28 5c94b4/c8a048/88b4cc clouds
painting mount i picture 28 c85838/d8b040/e89058 clouds
poster mount i poster 32 e8dc38/e04c30/c8b820 dots
clock mount i clock 22 8c4c94/d83838/6c3474 plain
sconce mount i sconce 24 f0d088/b07828/d0a850 bars
light hang i light 18 f8e890/ffffd8/e0c860 plain
lamp small i lamp 36 f0c860/88502c/d8a438 bars
chandelier hang i chandelier 28 e0b038/fff8d0/b88818 dots
fan small i fan 32 70a8b8/e8f4f8/508898 rings
fireplace back i fireplace 42 b0543c/f09028/d8b8a0 bricks
radiator back i radiator 26 e8e4e0/c05030/c4c0bc bars
refrigerator back i fridge 54 d4dce0/788890/b8c4cc plain
refridgerator back i fridge 54 d4dce0/788890/b8c4cc plain
fridge back i fridge 54 d4dce0/788890/b8c4cc plain
washer stand i washer 36 e8ecf4/e89830/c8d0e0 dots
dishwasher stand i dishwasher 34 a0a8ac/e04848/8c9498 lines
stove stand i stove 36 5c5c64/e84c30/787880 plain
oven stand i oven 32 485058/d8d8d8/343c44 tiles
microwave small i microwave 22 383c40/e8e0d0/585c60 plain
hood mount i hood 28 b8bcc4/686c74/989ca4 bars
sink stand i sink 32 dce8ec/a0a8b0/b8ccd4 tiles
bathtub stand i bathtub 30 f0f4f8/c0a860/c8e0ec waves
toilet stand i toilet 40 f4f0f0/a0c8e0/dcd4d8 plain
shower back i shower 52 a8c4d0/687880/88acbc tiles
bag small x bag 30 b84028/f0d088/902c18 weave
box stand x box 26 c8a068/f0e0c0/ac8448 lines
barrel stand x barrel 32 8c5828/484c50/6c4018 boards
basket small x basket 26 d8b060/8c5c20/a88038 weave
ashcan stand x ashcan 30 487058/c8d8cc/345c44 bars
book small i book 20 3868b0/d84848/284c90 lines
books small i book 20 3868b0/d84848/284c90 lines
paper small i paper 20 f8f8f0/5878b0/e8e8dc lines
plate small i plate 18 f0f0f8/4878d0/d0d4e8 rings
tray small i tray 18 b88430/e8e0d0/986818 rings
food small x food 22 d89048/d83c28/b06c2c speckle
glass small i glass 22 b8e4ec/8c2040/90ccd8 plain
cup small i cup 22 4cb0a0/fcf0d8/349484 zigzag
pot small x pot 26 c86038/50a048/a84824 lines
vase small i vase 32 4050b8/f4f0e0/7080d8 waves
plaything small x toy 28 f07890/f8e4c0/d85870 dots
ball small x ball 20 f0f0e8/e04038/d8d8d0 checks
conveyerbelt stand i conveyor 30 404448/c89858/606468 bars
otherstructure back i column 52 a4b0a0/7c8878/8c9888 bricks
otherfurniture stand i crate 34 7c6ca8/c8b8e8/60508c boards
otherprop small i star 24 58c878/f8f0a0/38a858 checks
"""

ALIASES = {
    "couch": "sofa",
    "pavement": "sidewalk",
    "signsymbol": "sign",
    "pedestrian": "person",
    "bicyclist": "rider",
    "plane": "aeroplane",
    "pottedplant": "pottedplant",
    "tv": "tvmonitor",
    "trashcan": "ashcan",
    "upperarm": "upperarms",
    "lowerarm": "lowerarms",
    "upperleg": "upperlegs",
    "lowerleg": "lowerlegs",
    "officechair": "swivelchair",
}
SURFACES = ("sky", "far", "ground", "ceiling", "wall")
GENERIC = ("blob", "crate", "cone", "star", "dome", "barrel", "box", "vase", "sculpture", "animal")


@dataclass(frozen=True)
class Look:
    """One line of the table. `tone` is the texture's second colour, `accent` that of the parts in role s."""

    place: str
    setting: str
    shape: str
    size: int
    base: Colour
    accent: Colour
    tone: Colour
    texture: str


@functools.cache
def _table() -> dict[str, Look]:
    table = {}
    for line in LOOKS.strip().splitlines():
        name, place, setting, shape, size, colours, texture = line.split()
        base, accent, tone = (parse_colour(code) for code in colours.split("/"))
        table[name] = Look(place, setting, shape, int(size), base, accent, tone, texture)
    return table


def look(name: str) -> Look:
    """The look of a class by its name in any spelling; a name that the table lacks gets one made from the name alone.

    Of a list of synonyms ("sofa, couch, lounge") the first counts.
    """
    letters = "".join(c for c in name.lower().split(",")[0].split(";")[0] if c.isalpha())
    letters = ALIASES.get(letters, letters)
    if letters in _table():
        return _table()[letters]
    dice = Dice(zlib.crc32(letters.encode()))
    base = hsv(dice.integer(0, 1535), dice.integer(110, 230), dice.integer(120, 240))
    accent = hsv(dice.integer(0, 1535), dice.integer(60, 220), dice.integer(160, 250))
    shape = dice.choice(GENERIC)
    return Look(
        "stand", "x", shape, dice.integer(30, 44), base, accent, bright(base, 70), dice.choice(sorted(TEXTURES))
    )
