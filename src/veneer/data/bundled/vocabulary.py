"""Sentences and values of the bundled task. Train and held-out share neither.

A template's {slots} are filled with values that the answer copies word for word; `{thing}`, `{speed}` and `{cue}` are
phrases from which the answer's category, flag or priority follows. "~place" and the like mark templates that leave a
field out, which the answer gives as null.
"""

from __future__ import annotations

SYSTEM = {
    "expense": 'Turn the message into JSON, schema "expense": merchant, amount (number), currency (EUR, USD or GBP), '
    "category (food, travel or office), date. Answer with one JSON object only.",
    "calendar": 'Turn the message into JSON, schema "calendar": title, date, time, place (null if not said), '
    "with. Answer with one JSON object only.",
    "order": 'Turn the message into JSON, schema "order": item, quantity (number), customer, city, express (true or '
    "false). Answer with one JSON object only.",
    "ticket": 'Turn the message into JSON, schema "ticket": product, version, email, priority (low, normal or high). '
    "Answer with one JSON object only.",
}

TEMPLATES = {
    "train": {
        "expense": [
            "Paid {amount} {currency} at {merchant} on {date} for {thing}.",
            "Hi, please book {thing} from {date}: {merchant}, {amount} {currency}. Thanks!",
            "{merchant} charged me {amount} {currency} for {thing} ({date}).",
            "Receipt attached. {thing}, {merchant}, {date}, total {amount} {currency}.",
            "On {date} I spent {amount} {currency} on {thing}, the shop was {merchant}.",
            "Could you refund {thing}? It was {amount} {currency} on {date}, paid to {merchant}.",
            "expense: {thing} / {merchant} / {amount} {currency} / {date}",
            "For the record, {date}: {thing} at {merchant}. I paid {amount} {currency} by card.",
            "{amount} {currency} went to {merchant} for {thing}, dated {date}.",
            "Hello, my card shows {amount} {currency} from {merchant}, that was {thing} on {date}.",
            "I bought {thing} at {merchant} for {amount} {currency}; the bill says {date}.",
            "Note to accounting: {thing} on {date}, {amount} {currency}, seller {merchant}.",
        ],
        "calendar": [
            "Can you put {title} with {person} on {date} at {time} in {place}?",
            "{person} wants to meet for {title} on {date}, {time}, {place}.",
            "Reminder: {title}, {date} {time}, {place}, together with {person}.",
            "Hi! {title} is on {date} at {time}. We meet {person} in {place}.",
            "Please schedule {title} for {time} on {date}. {person} will come to {place}.",
            "At {time} on {date} there is {title} in {place}; {person} joins.",
            "New entry: {date}, {time}, {title} with {person}, room is {place}.",
            "I promised {person} {title} on {date}. Let's say {time} in {place}.",
            "~place Add {title} with {person} on {date} at {time}.",
            "~place {person} asked for {title}, {date} at {time} works.",
            "~place Block {time} on {date} for {title} with {person}, please.",
            "~place {date}: {title}, starts {time}, with {person}.",
        ],
        "order": [
            "{customer} from {city} needs {quantity} {item}, {speed}.",
            "Please send {quantity} {item} to {customer} in {city}, {speed}.",
            "Order: {quantity} x {item} for {customer}, {city}. {Speed}.",
            "Hi, this is {customer}. I'd like {quantity} {item} shipped to {city}, {speed}.",
            "We need {quantity} {item} in {city}, {speed}. The name is {customer}.",
            "{quantity} {item} for {customer} please, address in {city}, {speed}.",
            "Ship to {city}: {item}, {quantity} pieces, customer {customer}, {speed}.",
            "{Speed}: {customer} ordered {quantity} {item}, going to {city}.",
            "Could {customer} get {quantity} {item}? Delivery to {city}, {speed}.",
            "Note: {city}, {customer}, {quantity} {item}, {speed}.",
            "I am writing for {customer} in {city}. We want {quantity} {item}, {speed}.",
            "{item} again, {quantity} of them, {speed}, for {customer} in {city}.",
        ],
        "ticket": [
            "{product} {version} crashes when I open it. {Cue}. Write to {email}.",
            "Hello, after the update to {version} my {product} is broken. {Cue}. My address: {email}",
            "{Cue}: {product} version {version} shows a blank page. Contact {email}.",
            "From {email}: {product} {version} does not print any more. {Cue}.",
            "I use {product}, version {version}. Saving fails. {Cue}. Reply to {email} please.",
            "Problem with {product} ({version}): login is refused. {Cue}. {email}",
            "{email} here. Since yesterday {product} {version} is slow. {Cue}.",
            "Search gives wrong results in {product} {version}. {Cue}. You can reach me at {email}.",
            "Support request for {product} {version}, sent by {email}. Export hangs. {Cue}.",
            "Please help: version {version} of {product} loses my settings. {Cue}. Mail: {email}",
            "{Cue}. The icons in {product} {version} look wrong, says {email}.",
            "Dear team, {product} {version} keeps asking for my password. {Cue}. Best, {email}",
        ],
    },
    "heldout": {
        "expense": [
            "The bill from {merchant} came to {amount} {currency}: {thing}, {date}.",
            "Hey, I had {thing} on {date}. {merchant} took {amount} {currency}, can I get it back?",
            "Please reimburse {amount} {currency}. It was {thing}, bought from {merchant} on {date}.",
            "{date} - {thing} - {amount} {currency} - {merchant}",
            "Yesterday's claim: {merchant} wanted {amount} {currency} for {thing}; invoice of {date}.",
            "My boss agreed to cover {thing}. I paid {merchant} {amount} {currency} on {date}.",
        ],
        "calendar": [
            "Let's do {title} in {place} on {date} at {time}, {person} is free.",
            "{title} in {place}: {person} proposes {date}, {time}.",
            "Could we fix {date} at {time} for {title}? {person} booked {place}.",
            "On {date} {person} and I have {title}, {time}, {place}.",
            "~place Don't forget {title} with {person}: {date}, {time}.",
            "~place {person} moved {title} to {date}, now at {time}.",
        ],
        "order": [
            "Good morning, {customer} in {city} would like {quantity} {item}, {speed}.",
            "Send {customer} ({city}) {quantity} {item}, {speed}.",
            "Put {quantity} {item} on the list for {customer}, destination {city}, {speed}.",
            "{customer} called: {quantity} {item} to {city}. {Speed}.",
            "For {city}, {speed}: {quantity} {item}, buyer {customer}.",
            "Can you deliver {quantity} {item} to {city} for {customer}? {Speed}.",
        ],
        "ticket": [
            "My {product} {version} will not start. {Cue}. Answer to {email}.",
            "{product} {version}: the upload stops half way. {Cue}. Sent from {email}",
            "{Cue}. In version {version} of {product} the menu is gone. Ask {email}.",
            "Hi support, {email} writes: {product} {version} deletes my notes. {Cue}.",
            "The sound in {product} version {version} is missing. {Cue}. Email {email}.",
            "Something is off with {product}, version {version}: dates are wrong. {Cue}. Thanks, {email}",
        ],
    },
}

VALUES = {
    "train": {
        "merchant": "Alberto's,Green Leaf,Kiosk 21,Nordwind,Blue Harbor,Papier & Co,Casa Lola,Metro Market,Sunrise Deli,"
        "Hartmann,Old Mill,Rossi,City Corner,Fontana,Birch & Sons,Lakeside Inn,Tanaka,Petit Jardin,Omega Store,Bluebird",
        "person": "Anna,Mehmet,Julia,Tom,Priya,Carlos,Ingrid,Samuel,Fatima,Oliver,Chen,Marta,David,Elena,Jonas,Amira",
        "title": "the budget review,a project kickoff,the yearly checkup,a job interview,the design workshop,a team lunch,"
        "the parents' evening,a product demo,the tax appointment,a guitar lesson,the safety training,a status call",
        "place": "Room 4,the main office,Berlin,the library,Hall B,the Lisbon branch,the cafeteria,Room 12,the town hall,"
        "Studio 3,the east wing,Madrid",
        "item": "garden chairs,coffee mugs,desk lamps,wool blankets,tea boxes,bike helmets,wooden toys,phone cases,"
        "paper rolls,steel bolts,picture frames,rain jackets",
        "customer": "Mrs Keller,Acme Tools,Mr Novak,Lindgren AB,Ms Ortega,Dr Haas,Brook School,Mr Tanaka,Vega Foods,"
        "Mrs Rossi,Hill Farm,Ms Dubois",
        "city": "Hamburg,Lyon,Porto,Krakow,Leeds,Turin,Ghent,Malmo,Graz,Bilbao,Cork,Basel",
        "product": "PhotoDesk,MailBird,Ledger Plus,MapTool,NoteFlow,ShopPilot,PrintHub,TimeSheet,DataGrid,SafeBox",
        "user": "anna.b,jkeller,m.santos,office,tom77,priya,team-a,carlos.r,helga,info,sam.w,lin,desk-4,olga.p,rafa,"
        "service,kim22,the-boss,d.mueller,eva.k,joe,sales-2,hq,maria.lopez,ulf,x.zhang,front-desk,gina8,paul.d,it-help",
        "domain": "example.com,mail.example,firma.example,shop.example,studio.example,bakery.example,school.example,"
        "lab.example,garden.example,news.example",
    },
    "heldout": {
        "merchant": "Golden Fork,Riverstone,Quick Stop,Maison Noir,Zephyr,Tiger Lily,North Gate,Bellini,Station Shop,Kumar",
        "person": "Bruno,Hannah,Yusuf,Clara,Dmitri,Sofia,Peter,Leila",
        "title": "the sales meeting,a dentist visit,the press briefing,a piano class,the annual audit,a farewell party,"
        "the board session",
        "place": "Room 9,the garden,Vienna,Building C,the top floor,the Oslo office,the museum",
        "item": "floor tiles,water bottles,office chairs,cotton shirts,candle sets,beach towels,glass bowls",
        "customer": "Mr Weber,Orion Labs,Mrs Silva,Castle Hotel,Ms Nguyen,Baker & Sons,Dr Moreau",
        "city": "Bremen,Nantes,Gdansk,Bristol,Verona,Bruges,Seville",
        "product": "CloudNote,TaskLine,BudgetApp,PixelPro,VideoKit,ChatRoom",
        "user": "bruno.k,clara,help-me,n.weber,yusuf9,sofia.l",
        "domain": "inbox.example,work.example,post.example",
    },
}

PHRASES = {
    "train": {
        "category": {
            "food": "lunch with the team,coffee and cake,a dinner with clients,snacks for the meeting,groceries,a light meal",
            "travel": "a taxi ride,two train tickets,one night in a hotel,the parking fee,fuel for the car,a ferry crossing",
            "office": "printer paper,a new keyboard,pens and folders,toner,a desk chair,sticky notes",
        },
        "express": {
            "true": "express please,by next-day delivery,as fast as possible,urgent,it must arrive tomorrow",
            "false": "no rush,standard shipping is fine,slow delivery is okay,take your time,not urgent",
        },
        "priority": {
            "high": "This is urgent,Nobody can work,It is an emergency,Very important,We need help right now,"
            "Please fix it today,It is critical,Everything has stopped,Top priority,High priority",
            "normal": "Normal priority,It is annoying but we manage,Please look at it this week,A usual problem,"
            "Medium priority,We can work around it,An ordinary fault,Some of us are affected,The urgency is normal",
            "low": "No hurry,Just a small thing,Low priority,Not important,Only cosmetic,Whenever you have time,"
            "It can wait,A tiny detail,Nothing serious,The urgency is low",
        },
    },
    "heldout": {
        "category": {
            "food": "breakfast with a partner,pizza for everyone,sandwiches and juice",
            "travel": "a flight to the fair,the bus fare,a rental car",
            "office": "notebooks and pencils,a computer mouse,envelopes",
        },
        "express": {
            "true": "express delivery please,as quickly as possible,this is urgent",
            "false": "there is no rush,standard delivery is fine,it is not urgent",
        },
        "priority": {
            "high": "This is very urgent,Help is needed today,The priority is high",
            "normal": "The priority is normal,It is of normal urgency,It is annoying but we can work",
            "low": "There is no hurry,It can wait a little,The priority is low",
        },
    },
}
