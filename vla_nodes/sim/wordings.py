"""The words people use: for colours and things, for what to do with them, and for what this robot cannot do.

Training draws from these, and from nothing in held_out.py. In a phrase {x} is the thing, {y} the goal, {d} the drawer,
{in} and {into} how one puts something into that goal, {r} a relation to it.
"""

from __future__ import annotations

SYNONYMS = {  # heard for a colour
    "red": ("crimson", "ruby", "cherry", "vermilion", "cardinal", "carmine", "tomato", "strawberry", "garnet",
            "reddish", "blood red", "brick red", "fire red", "cherry red"),
    "green": ("emerald", "jade", "lime", "olive", "fern", "shamrock", "avocado", "mint", "greenish", "forest green",
              "grass green", "moss green", "pea green"),
    "blue": ("navy", "cobalt", "sapphire", "ultramarine", "denim", "bluish", "indigo", "cerulean", "royal blue",
             "navy blue", "ocean blue"),
    "yellow": ("golden", "lemon", "canary", "mustard", "sunflower", "yellowish", "saffron", "sun yellow",
               "corn yellow"),
    "orange": ("pumpkin", "apricot", "amber", "carrot", "mango", "marigold", "orangish", "copper", "burnt orange"),
    "purple": ("violet", "lilac", "lavender", "plum", "mauve", "amethyst", "grape", "eggplant", "purplish", "orchid",
               "royal purple"),
    "pink": ("fuchsia", "salmon", "blush", "bubblegum", "flamingo", "pinkish", "carnation", "hot pink", "baby pink"),
    "cyan": ("turquoise", "teal", "aqua", "aquamarine", "lagoon", "sea green", "sky blue", "light blue"),
    "white": ("ivory", "cream", "pearl", "chalk", "snowy", "whitish", "milky", "snow white", "milk white"),
    "black": ("ebony", "onyx", "charcoal", "coal", "inky", "blackish", "raven", "jet black", "pitch black",
              "coal black"),
}  # fmt: skip
SHADES = ("bright", "dark", "deep", "plain")  # said before a colour, which stays the same colour
ADJECTIVES = ("small", "little", "wooden", "plastic", "shiny")
KINDS = {"block": ("block", "cube", "brick"), "can": ("can", "cylinder", "tin", "canister"),
         "bowl": ("bowl", "dish", "basin"), "tray": ("tray", "platter", "plate"), "drawer": ("drawer",)}  # fmt: skip
ARTICLES = ("the",) * 16 + ("that", "this", "my", "")

PHRASES = {
    "pick": ("pick up {x}", "pick {x} up", "grab {x}", "lift {x}", "take {x}", "grasp {x}", "get {x}", "lift up {x}",
             "pick up {x} from the table", "hold {x} up", "raise {x}", "collect {x}", "retrieve {x}", "hoist {x}",
             "snatch {x}", "pluck {x} from the table", "take hold of {x}", "get hold of {x}", "give me {x}",
             "hand me {x}", "bring me {x}", "i need {x}", "i would like {x}", "lift {x} into the air", "go get {x}",
             "lift {x} from the table", "raise {x} from the table", "take {x} from the table", "lift {x} up high",
             "elevate {x}", "bring up {x}", "{x} should be lifted", "have {x} picked up", "reach for {x} and lift it",
             "find {x} and pick it up", "clutch {x}", "obtain {x}", "i need you to get {x}"),
    "in": ("put {x} {in} {y}", "place {x} {in} {y}", "move {x} {into} {y}", "drop {x} {in} {y}", "set {x} {in} {y}",
           "pick up {x} and put it {in} {y}", "take {x} and place it {in} {y}", "pick {x} and drop it {in} {y}",
           "{in} {y} put {x}", "bring {x} to {y}", "grab {x} and put it {in} {y}", "transfer {x} {into} {y}",
           "{x} belongs {in} {y}", "{x} should be {in} {y}", "{x} has to be {in} {y}", "{x} should go {in} {y}",
           "{x} must go {in} {y}", "{x} needs to go {in} {y}", "{x} is to go {in} {y}", "{x} ought to be {in} {y}",
           "i need {x} {in} {y}", "we need {x} {in} {y}", "i would like {x} {in} {y}", "i wish {x} was {in} {y}",
           "leave {x} {in} {y}", "lay {x} {in} {y}", "store {x} {in} {y}", "stow {x} {in} {y}", "get {x} {into} {y}",
           "let {x} end up {in} {y}", "make sure {x} is {in} {y}", "find {x} and put it {in} {y}",
           "lift {x} and lower it {into} {y}", "{in} {y} is where {x} belongs", "carry {x} to {y}",
           "deliver {x} to {y}", "release {x} {in} {y}", "throw {x} {into} {y}", "toss {x} {into} {y}",
           "have {x} {in} {y}", "keep {x} {in} {y}", "insert {x} {into} {y}", "bring {x} over and put it {in} {y}",
           "relocate {x} {into} {y}", "dump {x} {in} {y}", "add {x} to {y}"),
    "stack": ("stack {x} on {y}", "stack {x} on top of {y}", "put {x} on top of {y}", "put {x} on {y}",
              "place {x} on {y}", "place {x} on top of {y}", "set {x} on {y}", "put {x} onto {y}", "pile {x} on {y}",
              "pick up {x} and put it on {y}", "take {x} and stack it on {y}", "move {x} onto {y}",
              "{x} belongs on {y}", "{x} should be on top of {y}", "{x} should go on {y}", "{x} must go on top of {y}",
              "{x} needs to be on {y}", "{x} has to sit on top of {y}", "i need {x} on {y}",
              "we need {x} on top of {y}",
              "i would like {x} on {y}", "i wish {x} was on {y}", "rest {x} on {y}", "lay {x} on {y}",
              "set {x} down on {y}", "lift {x} onto {y}", "perch {x} on {y}", "make a tower with {x} on {y}",
              "leave {x} on top of {y}", "get {x} onto {y}", "make {x} stand on {y}", "build a stack of {x} on {y}",
              "lower {x} onto {y}", "have {x} on top of {y}", "let {x} rest on top of {y}", "position {x} on {y}"),
    "relation": ("put {x} {r} {y}", "place {x} {r} {y}", "move {x} {r} {y}", "set {x} {r} {y}",
                 "set {x} down {r} {y}", "pick up {x} and put it {r} {y}", "take {x} and place it {r} {y}",
                 "{r} {y} put {x}", "bring {x} {r} {y}", "move {x} so that it is {r} {y}", "{r} {y} place {x}",
                 "{x} belongs {r} {y}", "{x} should be {r} {y}", "{x} should go {r} {y}", "{x} must go {r} {y}",
                 "{x} has to stand {r} {y}", "{x} needs to be {r} {y}", "i need {x} {r} {y}", "we need {x} {r} {y}",
                 "i would like {x} {r} {y}", "i wish {x} was {r} {y}", "leave {x} {r} {y}", "lay {x} {r} {y}",
                 "position {x} {r} {y}", "relocate {x} {r} {y}", "carry {x} {r} {y}", "get {x} {r} {y}",
                 "make {x} sit {r} {y}", "arrange {x} {r} {y}", "park {x} {r} {y}", "drop {x} {r} {y}",
                 "let {x} end up {r} {y}", "make sure {x} is {r} {y}", "{r} {y} is where {x} belongs",
                 "have {x} {r} {y}", "transfer {x} {r} {y}", "find {x} and put it {r} {y}"),
    "open": ("open {d}", "pull {d} open", "pull open {d}", "open up {d}", "pull out {d}", "get {d} open",
             "make {d} open", "{d} should be open", "i need {d} open", "i would like {d} open", "have {d} open",
             "tug {d} open", "draw {d} open", "open {d} all the way", "let {d} be open", "{d} must be opened",
             "i need {d} to be opened", "crack {d} open"),
    "close": ("close {d}", "shut {d}", "push {d} shut", "push in {d}", "push {d} closed", "get {d} shut",
              "make {d} closed", "{d} should be shut", "{d} should be closed", "i need {d} closed", "have {d} shut",
              "i would like {d} closed", "press {d} shut", "slam {d} shut", "push {d} in", "close up {d}",
              "make sure {d} is shut", "{d} must be closed", "close {d} all the way"),
}  # fmt: skip
IN = {"bowl": ("in", "inside", "into", "inside of", "within"), "drawer": ("in", "inside", "into", "inside of"),
      "tray": ("on", "onto", "on top of")}  # fmt: skip
RELATION_WORDS = {
    "left": ("to the left of", "left of", "on the left of", "on the left side of", "to the left side of",
             "at the left of", "just left of", "immediately left of"),
    "right": ("to the right of", "right of", "on the right of", "on the right side of", "to the right side of",
              "at the right of", "just right of", "immediately right of"),
    "front": ("in front of", "to the front of", "at the front of", "just in front of", "right in front of",
              "on the near side of", "to the near side of", "on the front side of"),
    "behind": ("behind", "in back of", "at the back of", "to the back of", "right behind", "just behind",
               "on the far side of", "beyond", "to the far side of", "to the back side of", "on the back side of",
               "further back than"),
    "beside": ("next to", "beside", "near", "close to", "by", "right next to", "right beside", "adjacent to",
               "at the side of", "to the side of", "close by", "neighbouring", "by the side of", "right by"),
}  # fmt: skip
JOINS = ("{a}, then {b}", "{a} and then {b}", "{a} then {b}", "{a} and {b}", "{a}, after that {b}", "{a}, and {b}",
         "{a}. then {b}", "first {a}, then {b}", "first {a} and then {b}", "{a}. after that, {b}", "{a}. {b}",
         "{a}, {b}", "{a}, and after that {b}", "{a}, and finally {b}", "{a}. once that is done, {b}",
         "{a}. when that is done {b}", "{a}, later {b}", "{a}, subsequently {b}", "start with this: {a}, then {b}",
         "after you {a}, {b}", "{a} and also {b}", "{a}, thereafter {b}", "{a}, with that done {b}",
         "two things: {a} and {b}", "{a} and when you are done {b}")  # fmt: skip
PREFIXES = ("",) * 12 + ("please ", "please ", "can you ", "could you ", "robot, ", "now ", "go and ", "would you ",
                         "i would like you to ", "i need you to ", "you should ", "kindly ", "your task is to ", "ok, ",
                         "hey robot, ", "carefully ", "let us ", "your job: ", "just ", "quickly ")  # fmt: skip
SUFFIXES = ("",) * 12 + (" please", " now", ".", " for me", "!", " carefully", ", thanks", " right away", ", will you")

SMALL_TALK = ("what time is it", "hello robot", "how are you today", "sing a song", "the weather is nice",
              "tell me a joke", "who won the game last night", "make me a coffee", "turn on the lights",
              "drive to the station", "write an email to my boss", "call my mother", "what is this",
              "thank you very much", "the quick brown fox jumps over the lazy dog", "play some music",
              "water the plants", "lorem ipsum dolor sit amet")  # fmt: skip
UNRELATED = (*SMALL_TALK, "stop", "where is the red block", "do nothing", "wait", "open the window",
             "close the door", "pick up the phone", "put the car in the garage", "go home", "pick it up",
             "put it there", "pick up the block", "clean up the table", "open the gripper")  # fmt: skip
OTHER_KINDS = ("ball", "mug", "cup", "apple", "banana", "book", "pen", "spoon", "car", "hammer", "bottle", "phone",
               "sponge", "key", "lamp", "shoe", "egg", "sphere", "pyramid", "fork", "knife", "towel", "hat", "glove",
               "coin", "ring", "rope", "stone", "candle", "pencil", "brush", "screw", "battery", "marble", "glass",
               "jar", "pillow", "doll", "pear", "ruler", "wheel", "cone", "disc", "star", "cable", "card")  # fmt: skip
OTHER_PLACES = ("the basket", "the fridge", "the shelf", "the bin", "the microwave", "the sink", "the floor", "the box",
                "the bag", "the cupboard", "the chair", "the cart")  # fmt: skip
IMPOSSIBLE = ("do not pick up {x}", "don't touch {x}", "never move {x}", "where is {x}", "what is {x} made of",
              "what colour is {x}", "push {x}", "rotate {x}", "turn {x} around", "flip {x} over", "knock over {x}",
              "look at {x}", "point at {x}", "touch {x}", "paint {x}", "break {x}", "eat {x}", "kick {x}", "hit {x}",
              "open {x}", "close {x}", "clean {x}", "wipe {x}", "count {x}", "describe {x}", "photograph {x}",
              "is {x} there", "how heavy is {x}", "why is {x} here", "put {x}", "place {x}", "i like {x}",
              "do not put {x} in {y}", "don't open the drawer", "do not close the drawer", "is the drawer open",
              "leave {x} alone", "stay away from {x}", "ignore {x}", "fill {y} with water", "wash {y}",
              "lift {y}", "pick up {y}", "put {y} on the drawer", "paint the drawer")  # fmt: skip
