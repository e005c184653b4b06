# SPDX-License-Identifier: MIT
"""A grammar of everyday English over about a thousand common words: commands, colours, numbers, names, times, small talk.

A template is a string in which <name> is replaced by a random member of LISTS or by the text of a function of the same name; members may
hold further <names>. All text is lower case with spelled-out numbers and no punctuation.
"""

from __future__ import annotations

import random
import re

ONES = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth sixteenth "
    "seventeenth eighteenth nineteenth twentieth"
).split()

LISTS: dict[str, list[str]] = {
    name: text.split("|") if "|" in text else text.split()
    for name, text in {
        "name": "mary john anna peter paul sarah david emma james linda robert susan michael karen william lisa thomas nancy daniel "
        "helen mark laura george alice steven julia kevin maria brian ruth jack rose henry clara oliver sophie simon grace martin lucy "
        "frank jane arthur kate leo nina oscar eva tom ben sam max charlie harry lily ella mia noah adam eric victor diana rachel "
        "hannah emily jessica amanda andrew joseph edward richard christopher matthew anthony patrick philip monica teresa",
        "family": "mother father sister brother uncle aunt cousin grandmother grandfather son daughter wife husband friend neighbor "
        "teacher doctor boss baby",
        "color": "red blue green yellow black white brown orange purple pink gray silver golden",
        "size": "big small large little tiny huge long short tall wide narrow thick thin high low",
        "quality": "old new young good bad nice beautiful ugly clean dirty cold hot warm cool wet dry soft hard heavy light fast slow "
        "quick quiet loud bright dark empty full open closed rich poor strong weak happy sad angry tired hungry funny strange simple "
        "easy difficult cheap expensive fresh sweet sharp round flat broken lovely famous important dangerous friendly local modern "
        "perfect special wooden",
        "animal": "dog cat horse bird fish cow sheep pig mouse rabbit lion tiger bear wolf fox elephant monkey snake duck chicken frog "
        "spider bee butterfly whale goat camel turtle",
        "animals": "dogs cats horses birds fish cows sheep pigs mice rabbits lions tigers bears wolves foxes elephants monkeys snakes "
        "ducks chickens frogs spiders bees whales goats",
        "thing": "table chair book door window car house box bag cup bottle lamp key phone computer clock picture letter pen paper "
        "knife fork spoon plate bed shirt coat hat shoe ball boat bike train bus ship plane bridge wall garden tree flower stone "
        "river mountain island road street camera guitar piano radio television mirror umbrella ticket basket blanket candle hammer "
        "ladder machine pencil pillow pocket rope screen shelf sofa suitcase towel wallet watch wheel newspaper magazine map "
        "notebook package envelope ring carpet curtain kettle oven fridge",
        "things": "tables chairs books doors windows cars houses boxes bags cups bottles lamps keys phones computers clocks pictures "
        "letters pens papers knives forks spoons plates beds shirts coats hats shoes balls boats bikes trains trees flowers stones "
        "tickets candles photos stars questions answers words songs stories games apples oranges eggs cookies",
        "food": "bread butter cheese milk coffee tea water juice soup rice meat chicken fish salad fruit apple banana orange lemon "
        "cake chocolate sugar salt pepper egg potato tomato onion carrot pasta pizza sandwich breakfast lunch dinner honey ice cream "
        "wine beer corn beans mushrooms strawberries",
        "room": "kitchen|bedroom|living room|bathroom|garage|office|hall|basement|garden|dining room|attic|hallway|porch",
        "place": "school|market|station|airport|hospital|library|museum|park|beach|church|hotel|restaurant|bank|post office|office|"
        "theater|cinema|supermarket|factory|farm|forest|city|village|town|lake|harbor|castle|university|bakery|pharmacy|bus stop|"
        "gas station|police station|playground|swimming pool|mall|zoo|stadium|train station|town hall|coffee shop|mountains",
        "city": "london|paris|new york|boston|chicago|berlin|rome|madrid|tokyo|sydney|dublin|moscow|vienna|amsterdam|toronto|seattle|"
        "san francisco|los angeles|athens|cairo|oslo|lisbon|prague|denver|dallas|miami|edinburgh|glasgow|manchester|oxford|cambridge",
        "country": "england|france|germany|italy|spain|america|canada|china|japan|india|australia|ireland|scotland|russia|egypt|"
        "mexico|brazil|greece|norway|sweden|poland|africa|europe|asia",
        "day": "monday tuesday wednesday thursday friday saturday sunday",
        "month": "january february march april may june july august september october november december",
        "season": "spring summer autumn winter",
        "daytime": "morning afternoon evening night",
        "when": "today|tomorrow|yesterday|tonight|this morning|this afternoon|this evening|next week|last week|next month|last year|"
        "on <day>|every day|every <day>|right now|later|soon|at <clock>|in <month>|in the <daytime>|after <meal>|before <meal>|"
        "next <day>|last <day>|all day|once a week|at the weekend|at noon|at midnight|in a few minutes|two days ago|for a while",
        "meal": "breakfast lunch dinner work school",
        "where": "in the <room>|at the <place>|near the <place>|in <city>|at home|outside|upstairs|downstairs|over there|next to the "
        "<thing>|on the <thing>|under the <thing>|behind the <thing>|in front of the <place>|across the street|around the corner|"
        "in <country>|by the river|between the <thing> and the <thing>|in the middle of the <place>|far away|here|on the left|"
        "on the right|at the end of the road",
        "device": "light|lights|radio|television|heating|music|fan|air conditioner|computer|printer|alarm|oven|washing machine|lamp|"
        "camera|speaker|vacuum cleaner|coffee machine|dishwasher|heater|phone|microphone|projector",
        "weather": "sunny rainy cloudy windy foggy cold warm hot snowy stormy dry humid icy cool wet",
        "job": "teacher doctor nurse farmer driver pilot cook waiter lawyer engineer artist writer singer actor soldier student baker "
        "painter carpenter mechanic scientist secretary manager judge king queen captain sailor hunter gardener dentist policeman "
        "librarian programmer musician dancer",
        "subject": "mathematics history music science english french german geography art biology chemistry physics computers "
        "languages politics philosophy religion medicine",
        "verbed": "saw|found|bought|sold|lost|opened|closed|moved|carried|dropped|broke|cleaned|washed|painted|took|brought|kept|"
        "wanted|needed|liked|loved|forgot|remembered|pushed|pulled|showed|hid|threw|fixed|built|used|hated|borrowed|stole|touched|"
        "watched|noticed|ordered|packed|repaired|returned|shared|sent|tried|burned|counted|covered|filled|left|gave away",
        "verb": "see|find|buy|sell|lose|open|close|move|carry|drop|break|clean|wash|paint|take|bring|keep|want|need|like|love|forget|"
        "remember|push|pull|show|hide|throw|fix|build|use|borrow|touch|watch|order|pack|repair|return|share|send|try|count|cover|"
        "fill|hold|check|choose|collect|draw|explain|follow|leave|pay for|look at|wait for|talk about|think about|listen to",
        "doing": "reading|writing|working|sleeping|eating|drinking|running|walking|singing|dancing|swimming|playing|cooking|talking|"
        "laughing|waiting|driving|sitting|standing|learning|studying|thinking|crying|shopping|traveling|painting|climbing|flying|"
        "cleaning|dreaming|fighting|fishing|helping|jumping|listening|looking|resting|shouting|smiling|speaking|teaching|training",
        "do": "read a book|write a letter|go home|go to bed|wake up|get up|make dinner|cook <food>|drink <food>|eat <food>|walk the dog|"
        "feed the cat|clean the <room>|wash the dishes|do my homework|call <name>|visit <name>|play football|play the <instrument>|"
        "take a shower|take the bus|drive to work|buy some <food>|watch television|listen to music|learn <subject>|fix the <thing>|"
        "open the <thing>|close the door|go to the <place>|ride a bike|take a picture|send a message|pay the bill|find a job|"
        "leave early|stay here|sit down|stand up|wait for <name>|tell the truth|ask a question|help <name>|catch a train|"
        "meet at the <place>|talk to <name>|fly to <city>|move to <country>|save some money|change the password|read the news|"
        "start again|try something new|have a party|book a table|rent a car|speak slowly|turn around|keep quiet|work together",
        "instrument": "piano guitar violin drums flute trumpet",
        "person": "he|she|the <job>|my <family>|<name>|the man|the woman|the boy|the girl|our <family>|a <job>|the old man|"
        "the young woman|a stranger|someone|everybody|nobody|your <family>|the little girl|the <quality> <job>",
        "people": "we|they|you|i|<name> and <name>|the children|my parents|the students|people|our friends|my friends|some people|the "
        "neighbors|<number> men|the workers|these people|most people",
        "object": "the <thing>|a <quality> <thing>|the <color> <thing>|my <thing>|<number> <things>|the <size> <color> <thing>|"
        "the <animal>|a <size> <animal>|some <food>|the <things>|his <thing>|her <color> <thing>|this <thing>|that <thing>|"
        "a <thing> and a <thing>|everything|nothing|something <quality>|our <quality> <thing>|those <things>|many <things>",
        "polite": "please |could you please |can you |would you |will you | | | ",
        "unit": "minutes seconds hours days weeks",
        "degree": "very really quite too so rather not always never almost",
        "question": "what who where when why how",
        "adverb": "slowly quickly quietly carefully suddenly finally usually often sometimes always never again together alone "
        "immediately probably certainly already nearly only just still even maybe perhaps",
        "feeling": "happy sad angry tired hungry thirsty sick better fine worried afraid sure ready sorry glad surprised busy bored late "
        "alone wrong right lucky proud nervous excited confused",
        "body": "head hand arm leg foot eye ear nose mouth face back heart finger knee shoulder tooth hair stomach neck",
        "reason": "because it is <weather>|because <people> were late|because i am <feeling>|if you have time|when <person> comes home|"
        "before it gets dark|until the <thing> is <quality>|but <person> did not <verb> it|and then <people> went home|"
        "so <people> can <verb> it|although it was <weather>|while <people> were <doing>|as soon as possible|without <object>",
    }.items()
}

TEMPLATES: dict[str, list[str]] = {
    kind: templates.split("\n")
    for kind, templates in {
    "command": """<polite>turn on the <device>
<polite>turn off the <device>
<polite>turn off the <device> in the <room>
<polite>turn on the <room> <device>
<polite>turn the <device> up
<polite>turn down the <device>
<polite>set a timer for <number> <unit>
<polite>set an alarm for <clock>
<polite>set an alarm for <clock> on <day> <daytime>
<polite>set the temperature to <tens> degrees
<polite>set the <device> to <percent> percent
<polite>make the <device> brighter
<polite>dim the <room> lights to <percent> percent
<polite>play some music
<polite>play the next song
<polite>stop the music
<polite>pause the <device>
<polite>call my <family>
<polite>call <name> <when>
<polite>send a message to <name>
<polite>send <name> a message that i am <feeling>
<polite>remind me to <do>
<polite>remind me to <do> <when>
<polite>remind me at <clock> to <do>
<polite>add <food> to my shopping list
<polite>add <food> and <food> to the list
<polite>open the <room> door
<polite>lock the front door
<polite>open the <color> <thing>
<polite>close the window in the <room>
<polite>put the <color> <thing> on the <thing>
<polite>put <object> <where>
<polite>move the <size> <color> <thing> to the <room>
<polite>move <direction> <number> steps
<polite>go <direction> and then turn <direction>
<polite>pick up the <color> <thing>
<polite>bring me <object>
<polite>give me <number> <things>
<polite>give <name> the <color> <thing>
<polite>show me the way to the <place>
<polite>show me the weather for <city>
<polite>find a <place> near me
<polite>navigate to the <place> in <city>
<polite>take me to the <place>
<polite>read my messages
<polite>read the next message
<polite>tell me a joke
<polite>tell me the time
<polite>tell me the news
<polite>tell <name> that <people> are <feeling>
<polite>spell the word <anything>
<polite>start the <device>
<polite>stop the <device> after <number> <unit>
<polite>cancel the alarm
<polite>repeat that
<polite>translate this into <language>
<polite>save the file
<polite>delete the last word
<polite>scroll down
<polite>go back to the last page
<polite>close the program
<polite>search for <quality> <things>
<polite>book a flight to <city> on <date>
<polite>write an email to <name>
<polite>call the <place>
<polite>dial <digits>
<polite>turn <direction> at the <place>
<polite>wait for <number> <unit>
<polite>be quiet
<polite>come here
<polite>do not <verb> the <thing>
<polite>never <verb> <object> <when>
<polite>check the <device>
<polite>start recording
<polite>stop listening
<polite>show <number> <color> <things>""",
    "question": """what is the weather like <when>
what is the weather in <city>
what time is it
what time is it in <city>
what is the capital of <country>
what is your name
what are you <doing>
what do you want to <verb>
what did <person> <verb> <when>
what is <small> plus <small>
what is <small> minus <small>
what is <small> times <small>
where is the <place>
where is the nearest <place>
where is my <thing>
where are <people>
where do you live
where did <people> <verb> <object>
when does the <place> open
when does the next train to <city> leave
when is your birthday
when will <person> come home
who is <doing> <where>
who <verbed> <object>
who is your <family>
why are you so <feeling>
why did <person> <verb> <object>
why do <people> <verb> <object>
how are you <when>
how do you <verb> <object>
how do i get to the <place>
how far is it to <city>
how long does it take to <do>
how many <things> are <where>
how much does the <thing> cost
how much is the <quality> <thing>
how old is your <family>
can you help me
can you hear me
can you <do>
can i have <object>
could we <do> <when>
do you like <food>
do you have <object>
do you know the way to the <place>
do you want some <food>
do you speak <language>
did you <do>
did <person> <verb> <object> <when>
is it going to rain <when>
is it <weather> <where>
is there a <place> near here
is <person> <feeling>
are you <feeling>
are there any <things> <where>
have you seen <object>
have you ever been to <country>
will it be <weather> <when>
will you <do> <when>
should i take an umbrella
would you like some <food>
may i ask you something
which <thing> do you want
whose <thing> is this
does <person> <verb> <object>
what color is the <thing>
what happened to <object>
what do you think about <object>
what kind of <food> do you like""",
    "statement": """<person> <verbed> <object>
<person> <verbed> <object> <where>
<person> <verbed> <object> <when>
<people> <verbed> <object> <when>
<people> <verb> <object> <when>
<people> want to <do>
<people> want to <verb> <object>
<people> will <do> <when>
<person> will <verb> <object> <where>
<person> would like to <do>
<person> has to <do>
<person> is <doing> <where>
<person> was <doing> <when>
<people> are <doing> <where>
<people> were <doing> when the <thing> <fell>
<person> <adverb> <verbed> <object>
<people> can not <verb> <object>
<people> could not <verb> the <thing>
<person> did not <verb> <object>
i do not <verb> <object>
i don't know <question> <person> is
i don't think that <people> <verb> <object>
i can't <verb> the <thing>
it's <weather> <when>
that's <degree> <quality>
there's a <thing> <where>
there is a <size> <animal> <where>
there are <number> <things> <where>
there are <number> <color> <animals> <where>
there was a <quality> <thing> <where>
the <thing> is <color>
the <thing> is <degree> <quality>
the <color> <thing> is <where>
the <size> <color> <animal> ran over the <thing>
the <animals> are <doing> <where>
<number> <color> <animals> <moved> the <size> <thing>
my <family> is a <job>
my <family> lives in <city>
my <family> works at the <place>
my <body> hurts
my <thing> is <quality>
my name is <name>
<name> is <number> years old
<name> and <name> are <feeling>
<name> said that <person> <verbed> <object>
<name> told me that the <thing> was <quality>
<name> asked <question> the <thing> was
i am <feeling>
i am <degree> <feeling> <when>
i am from <country>
i think that <person> is <feeling>
i hope that <people> are <feeling>
i have <number> <things>
i have a <quality> <thing>
i like <food> and <food>
i would like <object> please
i would like <number> <things> and <object>
i need <object> <when>
i went to the <place> <when>
i went to <city> with <name> in <month>
i will meet <name> at the <place> <when>
i am going to <do> <when>
i used to <do> <when>
i forgot to <do>
we live in a <size> <quality> house
we went to <country> last <season>
we had <food> for dinner
we are learning <subject>
it is <weather> <where> <when>
it was a <quality> <color> <thing>
it is <clock> in the <daytime>
it is too <quality> to <do>
it takes <number> <unit> to <do>
in <season> the days are <quality>
on <day> <people> <verb> <object>
at <clock> <people> <verb> <object>
the train to <city> leaves at <clock>
the meeting starts at <clock> on <day>
the <place> opens at <clock>
the <place> is closed on <day>
the price is <big> dollars
the answer is <big>
the number is <digits>
his phone number is <digits>
today is <day> the <ordinal> of <month>
the year was <year>
she was born in <month> <year>
chapter <small>
page number <big>
the <ordinal> <thing> is <color>
the <thing> costs <big> dollars and <small> cents
good <daytime> <name>
hello <name> how are you
hello my name is <name>
thank you very much
thank you for the <quality> <thing>
see you <when>
happy birthday <name>
excuse me where is the <place>
yes i would like some <food>
no i don't like <food>
i'm sorry i am late
i'm <doing> <where>
you're <degree> <feeling>
he's my <family>
she's <doing> <where>
they're <feeling>
we're <doing> <when>
please don't <verb> <object>
let's <do> <when>
let us <verb> <object>
<digits>
<small>
<big>
<color> <color> <color>
<number> <things> and <number> <things>
<person> <verbed> <object> <reason>
<people> <verb> <object> <reason>
<people> want to <do> <reason>
<person> is <doing> <where> <reason>
if it is <weather> <people> will <do>
when <person> <verbed> <object> the <thing> <fell>
after <meal> <people> <verb> <object> <where>""",
    }.items()
}

LISTS["direction"] = "left right forward back up down north south east west".split()
LISTS["language"] = "english french german spanish italian chinese japanese russian dutch greek latin".split()
LISTS["fell"] = "fell|broke|stopped|started|opened|closed|arrived|disappeared|caught fire|made a noise".split("|")
LISTS["moved"] = "move|pull|push|carry|watch|follow|find|like|see|leave".split("|")


def _number(rng: random.Random) -> str:
    return rng.choice(ONES[2:] + ONES[1:] + TEENS[:4] + ["twenty", "a hundred", "several", "some", "many", "a few"])


def _below_hundred(value: int) -> str:
    if value < 10:
        return ONES[value]
    if value < 20:
        return TEENS[value - 10]
    return TENS[value // 10 - 2] + ("" if value % 10 == 0 else " " + ONES[value % 10])


def spell(value: int) -> str:
    """A whole number below a million in words."""
    if value < 100:
        return _below_hundred(value)
    if value < 1000:
        rest = value % 100
        return ONES[value // 100] + " hundred" + ("" if rest == 0 else " and " + _below_hundred(rest) if rest % 2 else " " + _below_hundred(rest))
    rest = value % 1000
    return spell(value // 1000) + " thousand" + ("" if rest == 0 else " " + spell(rest))


def _clock(rng: random.Random) -> str:
    hour = rng.choice(ONES[1:] + TEENS[:3])
    return rng.choice(
        [
            hour + " o'clock",
            "half past " + hour,
            "quarter past " + hour,
            "quarter to " + hour,
            hour + " " + rng.choice(["fifteen", "thirty", "forty five", "twenty", "ten", "fifty"]),
            hour + rng.choice([" am", " pm", " in the morning"]),
            hour,
        ]
    )


def _year(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return "two thousand" + rng.choice([""] + [" " + _below_hundred(n) for n in range(1, 30)] + [" and " + _below_hundred(n) for n in range(1, 20)])
    return rng.choice(["eighteen", "nineteen", "twenty"]) + " " + _below_hundred(rng.randint(10, 99))


FUNCTIONS = {
    "number": _number,
    "small": lambda rng: _below_hundred(rng.randint(0, 99)),
    "big": lambda rng: spell(rng.choice([rng.randint(0, 99), rng.randint(100, 999), rng.randint(1000, 99999)])),
    "tens": lambda rng: _below_hundred(rng.randint(10, 99)),
    "percent": lambda rng: _below_hundred(rng.choice(list(range(5, 100, 5)))) if rng.random() < 0.9 else "one hundred",
    "digits": lambda rng: " ".join(rng.choice(ONES + ["oh"]) for _ in range(rng.randint(2, 8))),
    "clock": _clock,
    "year": _year,
    "ordinal": lambda rng: rng.choice(ORDINALS + ["twenty " + word for word in ORDINALS[:9]] + ["thirtieth", "last"]),
    "date": lambda rng: rng.choice(["the <ordinal> of <month>", "<month> <ordinal>", "<day> the <ordinal>", "<day>"]),
    "anything": lambda rng: rng.choice(WORDS),
}

_SLOT = re.compile("<([a-z]+)>")


def expand(template: str, rng: random.Random) -> str:
    while True:
        slot = _SLOT.search(template)
        if slot is None:
            return " ".join(template.split())
        name = slot.group(1)
        text = FUNCTIONS[name](rng) if name in FUNCTIONS else rng.choice(LISTS[name])
        template = template[: slot.start()] + text + template[slot.end() :]


def _words() -> list[str]:
    texts = [" ".join(members) for members in LISTS.values()] + [" ".join(templates) for templates in TEMPLATES.values()]
    return sorted(set(_SLOT.sub(" ", " ".join(texts)).split()) | set(ONES + TEENS + TENS + ORDINALS))


WORDS = _words()


def sentence(rng: random.Random) -> str:
    """One random sentence of the grammar."""
    kind = rng.choices(["command", "question", "statement"], [0.25, 0.2, 0.55])[0]
    return expand(rng.choice(TEMPLATES[kind]), rng)


def random_words(rng: random.Random, words: list[str], low: int = 2, high: int = 10) -> str:
    """A string of words with no grammar, so that a decoder cannot guess from the text alone."""
    return " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))
