"""What customers write to a shop, in two languages: short messages of six kinds, put together from
what happened and how it is said. Knows words alone.

Its sentences are its own; no row of another example is drawn from here.
"""

from __future__ import annotations

import random

from phrases import PHRASES

Turn = tuple[str, str]
# kind (English, Chinese) -> things of it and what is said of them, in English, in Chinese; {} is
# a thing
KINDS: dict[tuple[str, str], tuple[str, str, str, str]] = {
    ("shipping", "配送"): (
        (
            "parcel|package|box|courier|tracking number|shipment|delivery van|pick-up point|postman|carrier|"
            "delivery time|express|shipping address|driver|letterbox|customs|warehouse|parcel locker|neighbour|mail"
        ),
        (
            "When will the {} arrive?|The {} has not come yet.|Where is the {} now?|The {} is two days late.|"
            "I waited all day for the {}.|Can you ship it with another {}?|The {} went to the wrong street.|"
            "It was left at the {} in the rain.|Nobody rang when the {} came.|Please send it to my office {}.|"
            "Do you deliver abroad, and by which {}?|The {} says on its way, for a week.|Can the {} come on Sunday?|"
            "How long does the {} take?|Has the {} left already?|The {} never turned up at my door."
        ),
        "包裹|快递|快递员|物流|运单|驿站|快递柜|派送员|邮政|海关|仓库|收货地址|配送|货车|门卫|邻居|取件码|快件",
        (
            "{}什么时候到？|{}还没有到。|{}现在在哪里？|{}晚了两天。|等{}等了一天。|能换一家{}吗？|{}送错了地方。|"
            "{}放在门口被雨淋了。|{}来的时候没人打电话。|请送到公司的{}。|海外能送吗，用哪家{}？|{}一周没有更新。|"
            "周末{}能送吗？|{}要几天？|发货了吗，{}走到哪了？|{}显示到了，可是没有收到。|{}怎么还不派送？"
        ),
    ),
    ("defect", "质量"): (
        (
            "zip|handle|screen|battery|seam|lid|button|wheel|colour|fabric|glass|charger|plug|leather|paint|motor|"
            "speaker|strap|sole|bottle|pan|lamp|chair|phone|shirt|watch|fan|keyboard|sleeve|leg"
        ),
        (
            "The {} broke after a day.|The {} is scratched.|The {} does not work.|There is a hole in the {}.|"
            "The {} smells bad.|The {} is not like in the picture.|The {} leaks.|A piece of the {} is missing.|"
            "The {} came in the wrong size.|The {} fell apart.|The {} is loose and rattles.|The {} faded in the wash.|"
            "The {} gets too hot.|The {} looks used, full of stains.|The {} cracked right away.|The {} stopped after a week.|"
            "The {} is thinner than you say.|The {} feels cheap and rough."
        ),
        (
            "拉链|把手|屏幕|电池|接缝|盖子|按钮|轮子|颜色|面料|玻璃|充电器|插头|皮子|油漆|电机|音箱|带子|鞋底|瓶子|锅|台灯|"
            "椅子|手机|衬衫|手表|风扇|键盘|袖子|水壶"
        ),
        (
            "{}用了一天就坏了。|{}有划痕。|{}不能用。|{}上有个洞。|{}味道很难闻。|{}和图片不一样。|{}漏水。|{}少了一块。|"
            "{}尺寸不对。|{}散架了。|{}松了，一直响。|{}洗一次就掉色。|{}太烫了。|{}像用过的，有污渍。|{}一打开就裂了。|"
            "{}一周就不动了。|{}比描述的薄。|{}做工很差，很粗糙。|{}一直闪。"
        ),
    ),
    ("money back", "退款"): (
        (
            "money|amount|deposit|price|payment|voucher|return|refund|difference|exchange|full sum|card|return label|"
            "cost|charge"
        ),
        (
            "When do I get the {} back?|I want to return it for a {}.|The {} has not been paid back.|"
            "Who pays for sending it back, and the {}?|I changed my mind, please give back the {}.|"
            "Can I return an opened item and get the {}?|How long does a return and the {} take?|"
            "I sent it back, where is my {}?|You returned only half of the {}.|I would like to cancel and get the {}.|"
            "It does not fit, can I send it back and have the {}?|Is the {} refundable?|"
            "Please refund the {} to my bank.|I was charged twice, refund the {}.|How do I ask for a return of the {}?"
        ),
        "钱|货款|定金|押金|差价|全款|金额|款项|退款|退货|退换|运费|优惠券|余额|付款",
        (
            "{}什么时候退回来？|我要退货，{}怎么退？|{}还没退到账。|寄回去的{}谁出？|不想要了，请退{}。|"
            "拆开了还能退{}吗？|退货和{}要多久？|已经寄回去了，{}呢？|只退了一半{}。|我想取消，把{}退给我。|"
            "不合适，能退{}吗？|{}可以退吗？|请把{}退回银行卡。|扣了两次，请退{}。|怎么申请退{}？|降价了能退{}吗？"
        ),
    ),
    ("login", "账号"): (
        (
            "password|account|e-mail|phone number|user name|profile|code|membership|points|settings|newsletter|"
            "address book|history|app|birthday"
        ),
        (
            "I cannot log in with my {}.|How do I change my {}?|I forgot my {}.|Please delete my {}.|"
            "The {} for signing in never comes.|My {} is locked.|Somebody else uses my {}.|My {} is gone after the update.|"
            "Can I have two of them under one {}?|Where do I find my {}?|I signed up twice with my {}.|"
            "How do I reset the {}?|My {} was hacked.|I am logged out again, the {} is not accepted.|"
            "How can I link the {} to my sign-in?|I do not want the {} any more, unsubscribe me."
        ),
        "密码|账号|账户|邮箱|手机号|用户名|资料|验证码|会员|积分|设置|头像|登录|注册|个人信息|记录",
        (
            "{}登不上去。|怎么修改{}？|忘记{}了。|请注销我的{}。|收不到{}。|我的{}被锁了。|有人用了我的{}。|更新以后{}不见了。|"
            "一个人能有两个{}吗？|在哪里看{}？|我用{}注册了两次。|怎么重置{}？|我的{}被盗了。|总是要重新登录，{}不对。|"
            "怎么绑定{}？|不想再收到{}的通知了。|怎样删除{}？"
        ),
    ),
    ("bill", "发票"): (
        (
            "invoice|receipt|bill|tax number|company name|VAT|paper copy|PDF|amount|title|statement|billing address|"
            "invoice date|tax"
        ),
        (
            "Please send me the {}, I need an invoice.|The {} on the invoice is wrong.|I need a receipt with the {}.|"
            "Can you put the {} on the bill?|I have not got the invoice with the {}.|Where can I download the {}?|"
            "My accountant asks for the {}.|Can I get one {} for three orders?|Change the {} to my company, please.|"
            "How many days until the {} is issued?|Do you issue an invoice with {}?|The {} is missing on my receipt.|"
            "Please cancel the {} and write a new invoice.|I want a paper {} for my taxes."
        ),
        "发票|收据|税号|抬头|公司名称|增值税|纸质发票|电子发票|金额|专票|普票|报销单|开票|账单",
        (
            "请给我开{}。|发票的{}写错了。|我需要带{}的收据。|能把{}写进发票吗？|还没收到{}，发票呢？|在哪里下载{}？|"
            "会计要{}报销。|三个订单能开一张{}吗？|请把发票{}改成公司。|{}几天能开出来？|能开{}的发票吗？|发票上没有{}。|"
            "请作废{}重开发票。|报税要用{}。|开发票时{}怎么填？"
        ),
    ),
    ("praise", "表扬"): (
        (
            "service|shop|app|present|colour|taste|quality|packing|team|bag|help|cake|design|price|book|toy|answer|"
            "coffee|staff|dress"
        ),
        (
            "I love the {}!|The {} is wonderful, thank you.|Great {}, I will come back.|My mother is happy with the {}.|"
            "Five stars for the {}.|The best {} I ever had.|Thank you so much for the {}.|The {} is just perfect.|"
            "What a beautiful {}!|Very kind {}, well done.|I told all my friends about the {}.|Lovely {}, keep it up.|"
            "The {} was better than I hoped.|A joy, this {}.|So pleased with the {}.|Excellent {}, friendly and quick."
        ),
        "服务|店铺|客服|礼物|颜色|味道|质量|包装|团队|包|帮助|蛋糕|设计|价格|书|玩具|回答|咖啡|店员|裙子|做工",
        (
            "{}太好了，我很喜欢！|{}很棒，谢谢你们。|{}一流，下次还来。|妈妈对{}很满意。|给{}五星好评。|这是最好的{}。|"
            "非常感谢{}。|{}完美。|好漂亮的{}！|{}很热情，点赞。|已经把{}推荐给朋友。|{}真贴心，加油。|{}比想的还好。|"
            "{}让人开心。|对{}超级满意。|{}又好又快，辛苦了。|{}真不错，赞！"
        ),
    ),
}  # fmt: skip


_FRAMES = (
    ("{}.|{}!|Hello, {}.|Sorry, but {}.|{}, please help.|{}?|About my order: {}.|I say it again: {}.|Well, {}."),
    ("{}。|{}！|你好，{}。|请问{}？|{}，麻烦看一下。|{}？|关于订单：{}。|我再说一次，{}。|{}啊。|客服，{}。"),
)


def _in_other_words(rng: random.Random, zh: bool, kind: tuple[str, str]) -> str:
    """One or two phrases of a kind."""
    said = rng.sample(PHRASES[kind[0]][zh].split("|"), rng.choice((1, 1, 2)))
    text = rng.choice(_FRAMES[zh].split("|")).format(("，" if zh else ", ").join(said))
    return text if zh else text[0].upper() + text[1:]


def message(rng: random.Random, zh: bool, kind: tuple[str, str]) -> str:
    if rng.random() < 0.5:
        return _in_other_words(rng, zh, kind)
    things, said = KINDS[kind][2 * zh], KINDS[kind][2 * zh + 1]
    return rng.choice(said.split("|")).format(rng.choice(things.split("|")))


LABELS = {  # kind -> what it may be called, English and Chinese
    "shipping": (("shipping", "delivery", "logistics"), ("配送", "物流", "快递")),
    "defect": (("defect", "quality", "broken goods"), ("质量", "次品", "质量问题")),
    "money back": (("money back", "refund", "returns"), ("退款", "退货", "退换")),
    "login": (("login", "account", "sign-in"), ("账号", "登录", "账户")),
    "bill": (("bill", "invoice", "receipt"), ("发票", "账单", "开票")),
    "praise": (("praise", "thanks", "compliment"), ("表扬", "好评", "感谢")),
}


def kind_of(rng: random.Random, zh: bool) -> Turn:
    """Which of six kinds a message is, in a word of one's own or in one of those that are given."""
    kinds = list(KINDS)
    kind = rng.choice(kinds)
    text = message(rng, zh, kind)
    if rng.random() < 0.5:
        asks = (
            ("这条留言属于哪一类？", "顾客说的是什么事？", "")
            if zh
            else ("What kind of message is this?", "What is it about?", "")
        )
        return (f"{text}{rng.choice(asks)}" if zh else f"{text} {rng.choice(asks)}".strip()), kind[zh]
    shown = rng.sample(kinds, rng.randint(2, 6))
    if kind not in shown:
        shown[rng.randrange(len(shown))] = kind
    words = {k: rng.choice(LABELS[k[0]][zh]) for k in shown}
    listed = ("、" if zh else ", ").join(words.values())
    ask = f"从中选一类：{listed}" if zh else f"One of: {listed}"
    return (f"{text}{ask}" if zh else f"{text} {ask}"), words[kind]


def same_kind(rng: random.Random, zh: bool) -> Turn:
    """Which of two messages is of a kind."""
    one, other = rng.sample(list(KINDS), 2)
    texts = [message(rng, zh, one), message(rng, zh, other)]
    first = rng.random() < 0.5
    shown = texts if first else texts[::-1]
    q = (
        f"甲：{shown[0]}乙：{shown[1]}哪条是{one[1]}？"
        if zh
        else f"A: {shown[0]} B: {shown[1]} Which one is about {one[0]}?"
    )
    return q, ("甲" if first else "乙") if zh else "A" if first else "B"
